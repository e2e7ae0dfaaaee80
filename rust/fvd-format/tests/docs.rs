// SPDX-License-Identifier: MIT OR Apache-2.0
//! `docs/format.md` and the code say the same: limits, offsets of header fields, the example.

mod common;

use common::{distinct, dump, example};
use fvd_format::{Header, PageZero, header, limits};

fn document() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/format.md")).expect("docs/format.md")
}

/// The text between `<!-- name -->` and the next `<!-- end -->`.
fn section(document: &str, name: &str) -> String {
    let (_, rest) = document.split_once(&format!("<!-- {name} -->\n")).unwrap_or_else(|| panic!("no part {name}"));
    rest.split_once("<!-- end -->").expect("an end").0.to_owned()
}

/// The cells of a table's rows, without its head.
fn rows(table: &str) -> Vec<Vec<String>> {
    table
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

#[test]
fn limits_agree() {
    macro_rules! constants {
        ($($name:ident),* $(,)?) => { vec![$((stringify!($name), u128::from(limits::$name as u64))),*] };
    }
    let code = constants![
        PAGE_SIZE, SECTOR, VIRTUAL_SIZE_MAX, BLOCK_SIZE_MIN, BLOCK_SIZE_MAX, BITMAP_DEFAULT_MAX, CHUNK_SIZE_MIN,
        CHUNK_SIZE_MAX, CHUNK_SIZE_DEFAULT, CHUNKS_MAX, STORAGE_GROW_UNIT_DEFAULT, STORAGE_GROW_UNIT_MAX, JOURNAL_SIZE_MIN, JOURNAL_SIZE_MAX, JOURNAL_SIZE_DEFAULT,
        DOUBLE_WRITE_SIZE, SNAPSHOTS_MAX, NAME_MAX, SNAPSHOT_ID_MAX, PATH_MAX, FORMAT_NAME_MAX, CHAIN_DEPTH_MAX,
        WRITE_GRANULE_MAX, CARRIED_MAX, OWN_BITS_DEFAULT_MAX, KEY_AREA_MAX, PROFILE_RUNS_MAX, DIRTY_BITMAPS_MAX,
    ];
    let documented: Vec<(String, u128)> = rows(&section(&document(), "limits"))
        .into_iter()
        .map(|row| (row[0].trim_matches('`').to_owned(), row[1].parse().expect("a number")))
        .collect();
    let code: Vec<(String, u128)> = code.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    assert_eq!(documented, code);
    // No constant of limits.rs is missing from the list above.
    let source = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/limits.rs")).unwrap();
    assert_eq!(source.lines().filter(|line| line.starts_with("pub const ")).count(), code.len());
}

/// What `encode` must have written for a documented field, by the words of its description.
fn expected(field: &str, header: &Header, encoded: &[u8]) -> Vec<u8> {
    let u64 = |value: u64| value.to_le_bytes().to_vec();
    let u32 = |value: u32| value.to_le_bytes().to_vec();
    let text = |value: &str, size: usize| {
        let mut bytes = value.as_bytes().to_vec();
        bytes.resize(size, 0);
        bytes
    };
    let words = |start: &str| field.starts_with(start);
    match () {
        () if words("magic") => header::HEADER_MAGIC.to_vec(),
        // The checksum covers all the rest; decoding is what checks it.
        () if words("checksum") => encoded[8..12].to_vec(),
        () if words("header length") => u32(4096),
        () if words("UUID") => header.uuid.to_vec(),
        () if words("generation") => u64(header.generation),
        () if words("virtual size") => u64(header.virtual_size),
        () if words("encryption method") => header.crypt_method.to_be_bytes().to_vec(),
        () if words("state") => u32(1),
        () if words("incompatible features") => u64(header.incompatible),
        () if words("compatible features") => u64(header.compatible),
        () if words("autoclear features") => u64(header.autoclear),
        () if words("block size") => u32(header.block_size),
        () if words("chunk size") => u32(header.chunk_size),
        () if words("base length") => u64(header.base_length),
        () if words("covered length") => u64(header.covered),
        () if words("data offset") => u64(header.data_offset),
        () if words("storage grow unit") => u64(header.storage_grow_unit),
        () if words("reach") => u64(header.reach),
        () if words("epoch") => u64(header.epoch),
        () if words("first sequence") => u64(header.first_seq),
        () if words("first commit") => u64(header.first_commit),
        () if words("last finished batch") => u64(header.last_batch),
        () if words("last finished checkpoint") => u64(header.last_checkpoint),
        () if words("name of the base") => text(&header.base_name, 1024),
        () if words("format of the base") => text(&header.base_format, 32),
        () if words("name of the data file") => text(&header.data_name, 1024),
        () if words("format of the data file") => text(&header.data_format, 32),
        () if words("16 region slots") => header
            .regions
            .iter()
            .flat_map(|region| {
                let region = region.expect("all slots are filled");
                let mut slot = vec![0; 64];
                slot[..8].copy_from_slice(&region.offset.to_le_bytes());
                slot[8..16].copy_from_slice(&region.length.to_le_bytes());
                slot[16..20].copy_from_slice(&region.generation.to_le_bytes());
                slot[24..32].copy_from_slice(&region.map_first.to_le_bytes());
                slot[32..40].copy_from_slice(&region.count_sum.to_le_bytes());
                slot
            })
            .collect(),
        () => panic!("the test does not know the implemented field {field:?}"),
    }
}

#[test]
fn header_fields_lie_where_the_document_says() {
    let header = distinct();
    let encoded = header.encode(1);
    let mut at = 0;
    let mut implemented = 0;
    for row in rows(&section(&document(), "header-fields")) {
        let [offset, size, kind, field, state] = row.as_slice() else { panic!("five columns: {row:?}") };
        let (offset, size): (usize, usize) = (offset.parse().unwrap(), size.parse().unwrap());
        assert_eq!(offset, at, "{field}: a gap or an overlap before it");
        at += size;
        match kind.as_str() {
            "u32" | "u32be" => assert_eq!(size, 4, "{field}"),
            "u64" => assert_eq!(size, 8, "{field}"),
            _ => {}
        }
        let bytes = &encoded[offset..offset + size];
        match state.as_str() {
            "implemented" => {
                implemented += 1;
                assert_eq!(bytes, expected(field, &header, &encoded), "{field} at {offset}");
            }
            "described" => assert!(bytes.iter().all(|&b| b == 0), "{field} at {offset} is not written as zero"),
            other => panic!("{field}: state {other}"),
        }
    }
    assert_eq!(at, encoded.len(), "the table covers the whole copy");
    assert_eq!(implemented, 28);
}

#[test]
fn the_example_is_what_the_encoder_writes() {
    let header = example();
    header.validate().expect("the example is valid");
    let document = document();
    for (part, bytes) in [
        ("example-page-0", PageZero { uuid: header.uuid }.encode()),
        ("example-header-1", header.encode(1)),
    ] {
        let documented = section(&document, part);
        let documented = documented.trim().trim_matches('`').trim();
        assert_eq!(documented, dump(&bytes).trim(), "{part}; the right text is:\n{}", dump(&bytes));
    }
}

#[test]
fn rules_are_numbered_once_and_cited_ones_exist() {
    let document = document();
    let number = |text: &str| -> Option<u32> {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    let mut defined: Vec<u32> = document.split("**FMT-").skip(1).filter_map(number).collect();
    assert!(defined.windows(2).all(|pair| pair[0] < pair[1]), "numbers rise and none is used twice");
    defined.dedup();
    let mut cited: Vec<u32> = document.split("FMT-").skip(1).filter_map(number).collect();
    for file in ["header.rs", "page.rs", "bitmap.rs", "double_write.rs", "journal.rs"] {
        let source = std::fs::read_to_string(format!("{}/src/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        cited.extend(source.split("FMT-").skip(1).filter_map(number));
    }
    for rule in cited {
        assert!(defined.contains(&rule), "FMT-{rule} is cited but nowhere stated");
    }
}

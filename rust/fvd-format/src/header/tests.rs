// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;

pub(super) fn sample() -> Header {
    let mut header = Header {
        uuid: [9; 16],
        generation: 4,
        virtual_size: 10 << 30,
        crypt_method: 0,
        clean: true,
        pristine: false,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        block_size: 4096,
        chunk_size: 0,
        base_length: 1 << 30,
        covered: 1 << 30,
        data_offset: 32 << 20,
        storage_grow_unit: 0,
        reach: 0,
        epoch: 1,
        first_seq: 0,
        first_commit: 1,
        last_batch: 0,
        last_checkpoint: 0,
        base_name: "template.raw".into(),
        base_format: "raw".into(),
        data_name: String::new(),
        data_format: String::new(),
        regions: [None; REGION_SLOTS],
    };
    let region = |offset: u64, length: u64| Some(Region { offset, length, generation: 1, map_first: 0, count_sum: 0 });
    *header.region_mut(RegionKind::PageMap) = region(256 << 10, 4096);
    *header.region_mut(RegionKind::DoubleWrite) = region(512 << 10, 1 << 20);
    *header.region_mut(RegionKind::Journal) = region(2 << 20, 16 << 20);
    *header.region_mut(RegionKind::Bitmap) = region(20 << 20, bitmap::pages(header.blocks()) * 4096);
    header
}

#[test]
fn round_trip() {
    let header = sample();
    for copy in [1, 2] {
        assert_eq!(Header::decode(&header.uuid, copy, &header.encode(copy)).unwrap(), header);
    }
    assert!(Header::decode(&header.uuid, 1, &header.encode(2)).is_err(), "copies are not interchangeable");
    let zero = PageZero { uuid: header.uuid };
    assert_eq!(PageZero::decode(&zero.encode()).unwrap(), zero);
}

#[test]
fn guest_data_in_a_file_of_its_own() {
    let mut header = Header { data_offset: 0, data_name: "disk.raw".into(), data_format: "raw".into(), incompatible: incompatible::DATA_FILE, ..sample() };
    let page = header.encode(2);
    assert_eq!((&page[1568..1577], &page[2592..2596]), (&b"disk.raw\0"[..], &b"raw\0"[..]));
    assert_eq!(Header::decode(&header.uuid, 2, &page).unwrap(), header);
    // The disk's bytes take no room in the image file.
    assert_eq!((header.file_length_min(), header.data_length_min()), (header.regions_end(), 10 << 30));
    assert_eq!((sample().file_length_min(), sample().data_length_min()), ((32 << 20) + (10 << 30), 0));
    // Without the feature the bytes are reserved: ignored, and written as zero.
    header.incompatible = 0;
    header.data_offset = 32 << 20;
    let read = Header::decode(&header.uuid, 1, &header.encode(1)).unwrap();
    assert_eq!((read.data_name.as_str(), read.data_format.as_str()), ("", ""));
    assert_eq!(header.validate().unwrap_err().field, "data file name");
}

#[test]
fn any_flipped_bit_is_found() {
    let page = sample().encode(1);
    for bit in (0..PAGE_SIZE * 8).step_by(if cfg!(miri) { 4801 } else { 1 }) {
        let mut rotten = page.clone();
        rotten[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&[9; 16], 1, &rotten).is_err(), "bit {bit}");
    }
}

#[test]
fn the_newer_valid_copy_counts() {
    let old = sample();
    let mut new = sample();
    new.generation += 1;
    new.virtual_size *= 2;
    assert_eq!(Header::choose(&old.uuid, &old.encode(1), &new.encode(2)).unwrap(), new);
    assert_eq!(Header::choose(&old.uuid, &new.encode(1), &old.encode(2)).unwrap(), new);
    let torn = vec![0xaa; PAGE_SIZE];
    assert_eq!(Header::choose(&old.uuid, &old.encode(1), &torn).unwrap(), old);
    assert_eq!(Header::choose(&old.uuid, &torn, &new.encode(2)).unwrap(), new);
    assert!(Header::choose(&old.uuid, &torn, &torn).is_err());
}

#[test]
fn a_wrong_field_is_named() {
    let cases: Vec<(&str, Box<dyn Fn(&mut Header)>)> = vec![
        ("incompatible features", Box::new(|h| h.incompatible = 1 << 63)),
        ("crypt method", Box::new(|h| h.crypt_method = 3)),
        ("state", Box::new(|h| h.pristine = true)),
        ("virtual size", Box::new(|h| h.virtual_size += 1)),
        ("virtual size", Box::new(|h| h.virtual_size = 1 << 63)),
        ("generation or epoch", Box::new(|h| h.generation = 0)),
        ("generation or epoch", Box::new(|h| h.epoch = u64::MAX)),
        ("first sequence", Box::new(|h| h.first_seq = u64::MAX)),
        ("first commit", Box::new(|h| h.first_commit = u64::MAX)),
        ("last batch", Box::new(|h| h.last_batch = u64::MAX)),
        ("last checkpoint", Box::new(|h| h.last_checkpoint = u64::MAX)),
        ("reach", Box::new(|h| h.reach = u64::MAX)),
        ("chunk size", Box::new(|h| h.chunk_size = 1 << 20)),
        ("data offset", Box::new(|h| h.data_offset += 512)),
        ("data offset", Box::new(|h| h.data_offset = 4096)),
        ("data offset", Box::new(|h| h.data_offset = u64::MAX & !4095)),
        ("data offset", Box::new(|h| (h.incompatible, h.data_offset) = (incompatible::DATA_FILE, 511))),
        ("data file name", Box::new(|h| (h.incompatible, h.data_offset) = (incompatible::DATA_FILE, 0))),
        ("data file format", Box::new(|h| (h.incompatible, h.data_name) = (incompatible::DATA_FILE, "disk.raw".into()))),
        ("base format", Box::new(|h| h.base_format.clear())),
        ("base length", Box::new(|h| h.base_length = 513)),
        ("block size", Box::new(|h| h.block_size = 0)),
        ("block size", Box::new(|h| h.block_size = 12288)),
        ("block size", Box::new(|h| h.block_size = 4 << 20)),
        ("covered length", Box::new(|h| h.covered = h.base_length + 4096 + 512)),
        ("region", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().offset = 3 << 20)),
        ("region", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().offset = 0)),
        ("region", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().offset = h.data_offset)),
        ("region", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().offset = u64::MAX & !4095)),
        ("region", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().generation = 0)),
        ("region", Box::new(|h| h.regions[15] = Some(Region { offset: 28 << 20, length: 4096, generation: 1, map_first: 0, count_sum: 0 }))),
        ("bitmap", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().length -= 4096)),
        ("journal", Box::new(|h| *h.region_mut(RegionKind::Journal) = None)),
        ("journal", Box::new(|h| h.region_mut(RegionKind::Journal).as_mut().unwrap().length = 4096)),
        ("double-write area", Box::new(|h| *h.region_mut(RegionKind::DoubleWrite) = None)),
        ("page map", Box::new(|h| *h.region_mut(RegionKind::PageMap) = None)),
        ("page map", Box::new(|h| h.region_mut(RegionKind::Bitmap).as_mut().unwrap().map_first = 40_000)),
    ];
    for (field, spoil) in cases {
        let mut header = sample();
        spoil(&mut header);
        let error = Header::decode(&header.uuid, 1, &header.encode(1)).expect_err(field);
        assert_eq!(error.field, field, "{error}");
    }
}

/// The same image with chunks.
fn compact_sample() -> Header {
    let mut header = sample();
    (header.incompatible, header.chunk_size, header.storage_grow_unit, header.reach) = (incompatible::COMPACT, 1 << 16, 1 << 20, header.data_offset);
    let bitmap = header.region(RegionKind::Bitmap).unwrap().pages();
    let length = header.chunks().div_ceil(PAYLOAD_ENTRIES) * PAGE_SIZE as u64;
    *header.region_mut(RegionKind::Table) = Some(Region { offset: 24 << 20, length, generation: 1, map_first: bitmap, count_sum: 0 });
    header
}

#[test]
fn a_wrong_field_of_a_compact_image_is_named() {
    let good = compact_sample();
    assert_eq!(Header::decode(&good.uuid, 1, &good.encode(1)).unwrap(), good);
    let cases: Vec<(&str, Box<dyn Fn(&mut Header)>)> = vec![
        ("chunk size", Box::new(|h| h.chunk_size = 3 << 16)),
        ("chunk size", Box::new(|h| h.chunk_size = 1 << 15)),
        ("chunk size", Box::new(|h| h.incompatible = 0)),
        ("virtual size", Box::new(|h| h.virtual_size = (CHUNKS_MAX + 1) << 16)),
        ("storage grow unit", Box::new(|h| h.storage_grow_unit = 0)),
        ("storage grow unit", Box::new(|h| h.storage_grow_unit += 512)),
        ("storage grow unit", Box::new(|h| h.storage_grow_unit = 1 << 63)),
        ("lookup table", Box::new(|h| h.region_mut(RegionKind::Table).as_mut().unwrap().length -= 4096)),
        ("lookup table", Box::new(|h| *h.region_mut(RegionKind::Table) = None)),
    ];
    for (field, spoil) in cases {
        let mut header = compact_sample();
        spoil(&mut header);
        let error = Header::decode(&header.uuid, 1, &header.encode(1)).expect_err(field);
        assert_eq!(error.field, field, "{error}");
    }
}

/// A bitmap that goes on behind the base's end says what is zero there; only with chunks (FMT-16, FMT-31).
#[test]
fn bits_behind_the_base_say_zero() {
    assert_eq!(compact_sample().zero_from(), compact_sample().covered);
    for (base_length, zero_from) in [(0, 0), (512, 4096), ((1 << 30) - 512, 1 << 30), (1 << 29, 1 << 29), (u64::MAX, 1 << 30)] {
        let mut header = compact_sample();
        header.base_length = base_length;
        let decoded = Header::decode(&header.uuid, 2, &header.encode(2)).unwrap();
        assert_eq!(decoded.zero_from(), zero_from);
    }
    let mut flat = sample();
    flat.base_length = 1 << 29;
    assert_eq!(Header::decode(&flat.uuid, 1, &flat.encode(1)).unwrap_err().field, "covered length");
}

#[test]
fn page_zero_says_what_it_is_not() {
    let mut page = PageZero { uuid: [1; 16] }.encode();
    page[8] = 3;
    assert_eq!(PageZero::decode(&page).unwrap_err().kind, Kind::Unsupported);
    page[0] = b'Q';
    assert_eq!(PageZero::decode(&page).unwrap_err().kind, Kind::NotFvd);
    page[..4].copy_from_slice(&MAGIC_V1);
    assert_eq!(PageZero::decode(&page).unwrap_err().kind, Kind::Unsupported);
}

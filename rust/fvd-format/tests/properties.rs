// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must hold for all bytes: decoders never panic, whatever a stranger wrote, valid values
//! survive the round trip, and a journal that was cut returns exactly its whole commits.

mod common;

use bitvec::prelude::*;
use common::example;
use fvd_format::codec::{put_u32, put_u64};
use fvd_format::double_write::{BATCH_PAGES_MAX, Batch, BatchEntry};
use fvd_format::header::{BASE_LENGTH_UNKNOWN, HEADER_OFFSETS, REGION_SLOTS, REGIONS_START, incompatible};
use fvd_format::journal::{CommitId, Record, UNIT_PAYLOAD, decode_unit, encode_commit, scan, units_for};
use fvd_format::limits::*;
use fvd_format::page::{self, HEADER_SIZE, PAYLOAD_BITS, PageHeader};
use fvd_format::{Header, PageZero, Region, RegionKind, Uuid, bitmap, checksum};
use proptest::prelude::*;

const UUID: Uuid = [0x5a; 16];

/// Numbers at which arithmetic goes wrong, and plain ones.
fn nasty() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..5u64,
        (0..64u32, -2..=2i64).prop_map(|(bit, by)| (1u64 << bit).wrapping_add_signed(by)),
        (0..1u64 << 52).prop_map(|page| page * 4096),
        (0..1u64 << 20).prop_map(|page| page * 4096),
        Just(u64::MAX),
        Just(i64::MAX as u64),
    ]
}

fn kind() -> impl Strategy<Value = RegionKind> {
    (1..=12u16).prop_map(|n| RegionKind::from_u16(n).unwrap())
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}

// ---- header -------------------------------------------------------------------------------------

/// Makes the checksum of copy `copy` right again after fields were changed.
fn reseal_header(uuid: &Uuid, copy: usize, page: &mut [u8]) {
    let crc = checksum::seeded(uuid, checksum::kind::HEADER, copy as u64, &[&page[..8], &page[12..]]);
    put_u32(page, 8, crc);
}

/// Everything that is computed from an accepted header must be computable.
fn use_header(header: &Header) {
    header.validate().expect("decode has validated it");
    let end = header.regions_end().max(header.flat_data_end());
    assert!(end <= i64::MAX as u64);
    assert!(header.file_length_min() >= header.regions_end());
    assert!(header.blocks() <= VIRTUAL_SIZE_MAX / 4096 + 1);
    assert!(header.journal_units() <= JOURNAL_SIZE_MAX / 4096);
    for kind in RegionKind::ALL {
        if let Some(region) = header.region(kind) {
            assert!(region.pages() > 0 && region.offset >= REGIONS_START);
            region.map_first.checked_add(region.pages()).expect("page-map range");
        }
    }
}

/// A valid header: regions and data in any order, with any gaps.
fn valid_header() -> impl Strategy<Value = Header> {
    let sizes = (0..1u64 << 40, 0..1u64 << 40, 12..=21u32, any::<bool>(), any::<bool>());
    let numbers = prop::collection::vec(1..u64::MAX / 2, 7);
    let layout = (1..=256u64, Just((0..6usize).collect::<Vec<_>>()).prop_shuffle(), prop::collection::vec(0..100u64, 6));
    let map = (0..100_000u64, 0..5u64, any::<u64>());
    let text = ("[^\0]{1,200}", "[a-z0-9-]{1,31}", any::<[u8; 16]>(), any::<bool>(), any::<bool>());
    (sizes, numbers, layout, map, text).prop_map(
        |((virtual_size, base, block, with_bitmap, known), n, (journal, order, gaps), (first, spare, sum), (name, format, uuid, clean, two_files))| {
            let virtual_size = virtual_size / SECTOR * SECTOR;
            let base = base / SECTOR * SECTOR;
            let base_length = if known { base } else { BASE_LENGTH_UNKNOWN };
            let covered = if with_bitmap { virtual_size.min(base_length) } else { 0 };
            let with_bitmap = covered > 0;
            let block_size = if with_bitmap { 1 << block } else { 0 };
            let mut header = Header {
                uuid,
                generation: n[0],
                virtual_size,
                crypt_method: 0,
                clean,
                pristine: clean && !with_bitmap,
                incompatible: if two_files { incompatible::DATA_FILE } else { 0 },
                compatible: n[1],
                autoclear: n[2],
                block_size,
                chunk_size: 0,
                base_length,
                covered,
                data_offset: 0,
                storage_grow_unit: 0,
                reach: n[2] / 4096,
                epoch: n[1],
                first_seq: n[3],
                first_commit: n[4],
                last_batch: n[5],
                last_checkpoint: n[6],
                data_name: if two_files { name.clone() } else { String::new() },
                data_format: if two_files { format.clone() } else { String::new() },
                base_name: name,
                base_format: format,
                regions: [None; REGION_SLOTS],
            };
            let bitmap_pages = bitmap::pages(header.blocks());
            let map_pages = (first + bitmap_pages + 1).div_ceil(PAYLOAD_BITS) + spare;
            let mut at = REGIONS_START;
            for (place, gap) in order.into_iter().zip(gaps) {
                at += gap * 4096;
                let mut put = |header: &mut Header, kind: RegionKind, length: u64, map_first: u64| {
                    if length > 0 {
                        *header.region_mut(kind) = Some(Region { offset: at, length, generation: n[0] as u32 | 1, map_first, count_sum: sum });
                        at += length;
                    }
                };
                match place {
                    0 => put(&mut header, RegionKind::PageMap, map_pages * 4096, 0),
                    1 => put(&mut header, RegionKind::DoubleWrite, DOUBLE_WRITE_SIZE, 0),
                    2 => put(&mut header, RegionKind::Journal, journal << 20, 0),
                    3 => put(&mut header, RegionKind::Bitmap, bitmap_pages * 4096, first),
                    4 => put(&mut header, RegionKind::Profile, 4096, first + bitmap_pages),
                    // In a file of its own: anywhere.
                    _ if two_files => header.data_offset = n[1] % (1 << 40) / SECTOR * SECTOR,
                    _ => {
                        header.data_offset = at;
                        at = (at + virtual_size).next_multiple_of(4096);
                    }
                }
            }
            header
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn valid_headers_round_trip(header in valid_header(), copy in 1..=2usize) {
        let page = header.encode(copy);
        prop_assert_eq!(page.len(), PAGE_SIZE);
        prop_assert_eq!(&Header::decode(&header.uuid, copy, &page).unwrap(), &header);
        prop_assert!(Header::decode(&header.uuid, 3 - copy, &page).is_err());
        use_header(&header);
        prop_assert_eq!(&Header::choose(&header.uuid, &header.encode(1), &header.encode(2)).unwrap(), &header);
    }

    #[test]
    fn hostile_header_fields_never_panic(
        header in valid_header(),
        fields in prop::collection::vec((0..512usize, nasty(), any::<bool>()), 1..6),
        fixed in any::<bool>(),
    ) {
        let mut page = header.encode(1);
        for (word, value, half) in fields {
            // Half of the time hit the fields that mean something: the fixed part and the regions.
            let at = if fixed { if word % 3 == 0 { 2688 + word % 96 * 8 } else { word % 24 * 8 } } else { word * 8 };
            if half { put_u32(&mut page, at, value as u32) } else { put_u64(&mut page, at, value) }
        }
        reseal_header(&header.uuid, 1, &mut page);
        if let Ok(read) = Header::decode(&header.uuid, 1, &page) {
            use_header(&read);
            prop_assert_eq!(Header::decode(&read.uuid, 2, &read.encode(2)).unwrap(), read);
        }
        let _ = Header::choose(&header.uuid, &page, &header.encode(2));
    }

    #[test]
    fn choose_takes_the_newer_and_refuses_two_of_one_generation(header in valid_header(), newer in 1..1000u64) {
        let uuid = header.uuid;
        let mut other = header.clone();
        other.compatible ^= 1;
        prop_assert!(Header::choose(&uuid, &header.encode(1), &other.encode(2)).is_err());
        other.generation += newer;
        prop_assert_eq!(&Header::choose(&uuid, &header.encode(1), &other.encode(2)).unwrap(), &other);
        prop_assert_eq!(&Header::choose(&uuid, &other.encode(1), &header.encode(2)).unwrap(), &other);
        // A valid copy that breaks a rule refuses the image, even the older one (FMT-7).
        let mut broken = header.clone();
        broken.data_offset += 1;
        prop_assert!(Header::choose(&uuid, &broken.encode(1), &other.encode(2)).is_err());
    }

    #[test]
    fn page_zero_takes_any_bytes(seed in any::<u64>(), len in 0..200usize, fields in prop::collection::vec((0..8usize, nasty()), 0..3), magic in any::<bool>()) {
        let mut random = bytes(seed, len);
        let _ = PageZero::decode(&random);
        if magic && len >= 8 {
            random[..8].copy_from_slice(&fvd_format::header::MAGIC);
            let _ = PageZero::decode(&random);
        }
        let mut page = PageZero { uuid: UUID }.encode();
        for (word, value) in fields {
            put_u64(&mut page, word * 8, value);
        }
        let uuid: Uuid = page[16..32].try_into().unwrap();
        let crc = checksum::seeded(&uuid, checksum::kind::PAGE_ZERO, 0, &[&page[..48]]);
        put_u32(&mut page, 48, crc);
        if let Ok(zero) = PageZero::decode(&page) {
            prop_assert_eq!(&zero.encode()[..52], &page[..52]);
        }
    }

    #[test]
    fn default_block_sizes_keep_their_promise(length in nasty()) {
        let bitmap = |block: u32| length.div_ceil(u64::from(block)).div_ceil(8);
        for (block, most) in [(default_block_size(length), BITMAP_DEFAULT_MAX), (default_own_grain(length), OWN_BITS_DEFAULT_MAX)] {
            prop_assert!(block.is_power_of_two() && (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block));
            prop_assert!(bitmap(block) <= most || block == BLOCK_SIZE_MAX);
            prop_assert!(block == BLOCK_SIZE_MIN || bitmap(block / 2) > most, "not the smallest");
        }
    }
}

#[test]
fn header_copies_lie_apart_and_before_the_regions() {
    const { assert!(HEADER_OFFSETS[1] - HEADER_OFFSETS[0] >= WRITE_GRANULE_MAX + PAGE_SIZE as u64) };
    const { assert!(HEADER_OFFSETS[1] + PAGE_SIZE as u64 <= REGIONS_START) };
    // libvirt reads the first 33,280 bytes.
    const { assert!(HEADER_OFFSETS[0] + PAGE_SIZE as u64 <= 33_280) };
}

// ---- pages, bits, double-write area ---------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn pages_round_trip(kind in kind(), generation in 1..=u32::MAX, index in any::<u64>(), write_count in 1..=u32::MAX, checkpoint in any::<u64>(), seed in any::<u64>()) {
        let mut page = bytes(seed, PAGE_SIZE);
        let payload = page[HEADER_SIZE..].to_vec();
        let header = PageHeader { kind, generation, index, write_count, checkpoint };
        page::seal(&UUID, &header, &mut page);
        prop_assert_eq!(&page[HEADER_SIZE..], &payload);
        prop_assert_eq!(page::open(&UUID, kind, generation, index, &page).unwrap(), header);
        prop_assert!(page::open(&UUID, kind, generation, index ^ 1, &page).is_err());
    }

    #[test]
    fn hostile_pages_never_panic(kind in kind(), index in nasty(), seed in any::<u64>(), words in prop::collection::vec((0..4usize, nasty()), 0..4)) {
        let mut page = bytes(seed, PAGE_SIZE);
        let _ = page::open(&UUID, kind, 1, index, &page);
        page::seal(&UUID, &PageHeader { kind, generation: 1, index, write_count: 1, checkpoint: 0 }, &mut page);
        for (word, value) in words {
            put_u64(&mut page, word * 8, value);
        }
        let crc = checksum::seeded(&UUID, kind as u32, index, &[&page[4..]]);
        put_u32(&mut page, 0, crc);
        if let Ok(header) = page::open(&UUID, kind, 1, index, &page) {
            prop_assert!(header.index == index && header.kind == kind && header.write_count > 0);
        }
    }

    #[test]
    fn hostile_double_write_heads_never_panic(seed in any::<u64>(), count in 0..400u32, number in nasty(), kinds in any::<bool>()) {
        let mut head = bytes(seed, PAGE_SIZE);
        let _ = Batch::decode(&UUID, &head);
        put_u32(&mut head, 4, count);
        put_u64(&mut head, 8, number);
        if kinds {
            for entry in head[32..].chunks_exact_mut(16) {
                entry[0] = entry[0] % 12 + 1;
                entry[1] = 0;
            }
        }
        let crc = checksum::seeded(&UUID, checksum::kind::BATCH, number, &[&head[4..]]);
        put_u32(&mut head, 0, crc);
        let decoded = Batch::decode(&UUID, &head);
        prop_assert!(decoded.is_err() || (1..=BATCH_PAGES_MAX as u32).contains(&count));
        prop_assert!(!kinds || decoded.is_ok() == (1..=BATCH_PAGES_MAX as u32).contains(&count));
    }

    #[test]
    fn batches_round_trip(number in any::<u64>(), entries in prop::collection::vec((kind(), any::<u64>(), any::<u32>()), 1..=BATCH_PAGES_MAX)) {
        let entries = entries.into_iter().map(|(kind, index, crc)| BatchEntry { kind, index, crc }).collect();
        let batch = Batch { number, entries };
        prop_assert_eq!(Batch::decode(&UUID, &batch.encode(&UUID)).unwrap(), batch);
    }

    #[test]
    fn bits_lie_where_bitvec_puts_them(set in prop::collection::vec((0..5 * PAYLOAD_BITS, 1..200u64), 0..60)) {
        // Ours: page and bit of `locate`, then the word and the bit of FMT-30.
        let total = 5 * PAYLOAD_BITS;
        let mut pages = vec![vec![0u8; PAGE_SIZE]; bitmap::pages(total) as usize];
        let mut oracle = bitvec![u64, Lsb0; 0; total as usize];
        for &(first, count) in &set {
            for bit in first..(first + count).min(total) {
                let (page, in_page) = bitmap::locate(bit);
                let at = HEADER_SIZE + in_page as usize / 64 * 8;
                let page = &mut pages[page as usize];
                let word = u64::from_le_bytes(page[at..at + 8].try_into().unwrap()) | 1 << (in_page % 64);
                put_u64(page, at, word);
                oracle.set(bit as usize, true);
            }
        }
        let payload: Vec<u8> = pages.iter().flat_map(|page| page[HEADER_SIZE..].to_vec()).collect();
        let words: Vec<u8> = oracle.as_raw_slice().iter().flat_map(|word| word.to_le_bytes()).collect();
        prop_assert_eq!(&payload, &words);
        // And the bytes read as one long slice of bits, least significant first.
        let read = payload.view_bits::<Lsb0>();
        prop_assert_eq!(read.count_ones(), oracle.count_ones());
        for &(first, _) in &set {
            prop_assert!(read[first as usize]);
        }
    }

    #[test]
    fn counts_of_blocks_and_pages(covered in 0..=VIRTUAL_SIZE_MAX, exponent in 12..=21u32) {
        let block = 1u32 << exponent;
        let blocks = bitmap::blocks(covered, block);
        prop_assert!(blocks * u64::from(block) >= covered && blocks.saturating_sub(1) * u64::from(block) <= covered);
        prop_assert_eq!(blocks == 0, covered == 0);
        let pages = bitmap::pages(blocks);
        if blocks > 0 {
            let (page, bit) = bitmap::locate(blocks - 1);
            prop_assert_eq!(page, pages - 1);
            prop_assert!(bit < PAYLOAD_BITS);
            prop_assert_eq!(page * PAYLOAD_BITS + bit, blocks - 1);
        }
    }
}

// ---- journal ------------------------------------------------------------------------------------

fn place(journal: &mut [u8], units: &[u8], seq: u64) {
    let total = (journal.len() / PAGE_SIZE) as u64;
    for (i, unit) in units.chunks_exact(PAGE_SIZE).enumerate() {
        let at = ((seq + i as u64) % total) as usize * PAGE_SIZE;
        journal[at..at + PAGE_SIZE].copy_from_slice(unit);
    }
}

/// What stood in the journal before.
#[derive(Clone, Copy, Debug)]
enum Before {
    Zeros,
    Noise,
    /// The lap before, of this epoch: commits of one unit each, with lower numbers.
    SameEpoch,
    /// Units of another epoch at the very same sequence numbers.
    OtherEpoch,
}

fn before() -> impl Strategy<Value = Before> {
    prop_oneof![Just(Before::Zeros), Just(Before::Noise), Just(Before::SameEpoch), Just(Before::OtherEpoch)]
}

fn fill_before(journal: &mut [u8], what: Before, from: CommitId) {
    let total = (journal.len() / PAGE_SIZE) as u64;
    match what {
        Before::Zeros => {}
        Before::Noise => journal.copy_from_slice(&bytes(from.seq, journal.len())),
        Before::SameEpoch | Before::OtherEpoch => {
            for i in 0..total {
                let id = match what {
                    Before::SameEpoch => CommitId { epoch: from.epoch, seq: from.seq - total + i, commit: from.commit - total + i },
                    _ => CommitId { epoch: from.epoch - 1, seq: from.seq + i, commit: from.commit + i },
                };
                place(journal, &encode_commit(&UUID, id, &bytes(i, 300), PAGE_SIZE), id.seq);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_cut_loses_the_last_commit_and_nothing_else(
        half_units in 4..32u64,
        epoch in 2..1u64 << 62,
        seq in 1000..1u64 << 62,
        commit in 1000..1u64 << 62,
        sizes in prop::collection::vec(prop_oneof![0..200usize, 0..5 * UNIT_PAYLOAD, Just(UNIT_PAYLOAD), Just(2 * UNIT_PAYLOAD)], 1..12),
        granule in 0..3u32,
        before in before(),
        masks in prop::collection::vec(any::<u8>(), 8),
        whole in any::<bool>(),
    ) {
        let total = 2 * half_units;
        let granule = PAGE_SIZE << granule;
        let from = CommitId { epoch, seq, commit };
        let mut journal = vec![0; total as usize * PAGE_SIZE];
        fill_before(&mut journal, before, from);

        // As many commits as fit in one lap.
        let mut next = from;
        let mut payloads = Vec::new();
        let mut last = None;
        for size in sizes {
            let payload = bytes(next.seq ^ size as u64, size);
            let units = encode_commit(&UUID, next, &payload, granule);
            prop_assert_eq!(units.len() % granule, 0);
            let count = (units.len() / PAGE_SIZE) as u64;
            if next.seq + count - from.seq > total {
                break;
            }
            last = Some((next, journal.clone(), units.clone(), units_for(size) as usize));
            place(&mut journal, &units, next.seq);
            payloads.push(payload);
            next = CommitId { seq: next.seq + count, commit: next.commit + 1, ..next };
        }
        let found = scan(&UUID, &journal, from);
        prop_assert_eq!((&found.commits, found.next_seq, found.next_commit, found.damaged), (&payloads, next.seq, next.commit, false));

        // Now the last commit's write is cut: of each of its units some sectors reach the disk.
        let Some((id, mut cut, units, used)) = last else { return Ok(()) };
        let mut lost = false;
        for (i, unit) in units.chunks_exact(PAGE_SIZE).enumerate() {
            let at = ((id.seq + i as u64) % total) as usize * PAGE_SIZE;
            let mask = if whole { if masks[i % 8] & 1 == 1 { 0xff } else { 0 } } else { masks[i % 8] };
            for sector in (0..8).filter(|s| mask & (1 << s) != 0) {
                let range = sector * 512..(sector + 1) * 512;
                cut[at + range.start..at + range.end].copy_from_slice(&unit[range]);
            }
            // A filler that is lost loses nothing.
            lost |= i < used && cut[at..at + PAGE_SIZE] != *unit;
        }
        let found = scan(&UUID, &cut, from);
        let kept = if lost { payloads.len() - 1 } else { payloads.len() };
        prop_assert_eq!(&found.commits, &payloads[..kept]);
        prop_assert!(!found.damaged, "a cut is no damage");
        if lost {
            prop_assert_eq!((found.next_seq, found.next_commit), (id.seq, id.commit));
        } else {
            prop_assert!(found.next_seq <= next.seq && found.next_seq >= id.seq + used as u64);
        }

        // The same commit, tried again with more in it, at the same place: complete this time.
        let more = bytes(77, 100);
        let retried = encode_commit(&UUID, id, &more, granule);
        place(&mut cut, &retried, id.seq);
        let found = scan(&UUID, &cut, from);
        prop_assert_eq!(found.commits.len(), payloads.len());
        prop_assert_eq!(found.commits.last(), Some(&more));
        prop_assert!(!found.damaged);
    }

    #[test]
    fn a_retry_that_is_cut_too_never_mixes_with_the_first_try(
        sizes in (0..3 * UNIT_PAYLOAD, 0..2 * UNIT_PAYLOAD),
        seq in 0..1u64 << 62,
        granule in 0..2u32,
        first in prop::collection::vec(any::<bool>(), 8),
        second in prop::collection::vec(any::<bool>(), 8),
    ) {
        let id = CommitId { epoch: 3, seq, commit: 8 };
        let one = bytes(1, sizes.0);
        let two = bytes(2, sizes.0 + sizes.1);
        let mut journal = vec![0; 16 * PAGE_SIZE];
        for (payload, kept) in [(&one, &first), (&two, &second)] {
            let units = encode_commit(&UUID, id, payload, PAGE_SIZE << granule);
            for (i, unit) in units.chunks_exact(PAGE_SIZE).enumerate().filter(|(i, _)| kept[*i]) {
                place(&mut journal, unit, seq + i as u64);
            }
        }
        let found = scan(&UUID, &journal, id);
        prop_assert!(!found.damaged && found.commits.len() <= 1);
        if let Some(payload) = found.commits.first() {
            prop_assert!(*payload == one || *payload == two, "a mixture of two tries");
        }
    }

    #[test]
    fn a_lost_unit_before_the_last_commit_is_damage(
        sizes in prop::collection::vec(0..3 * UNIT_PAYLOAD, 2..6),
        victim in any::<prop::sample::Index>(),
        seq in 0..1u64 << 62,
    ) {
        let from = CommitId { epoch: 5, seq, commit: 9 };
        let mut journal = vec![0; 32 * PAGE_SIZE];
        let mut next = from;
        let mut starts = Vec::new();
        for &size in &sizes {
            let units = encode_commit(&UUID, next, &bytes(size as u64, size), PAGE_SIZE);
            place(&mut journal, &units, next.seq);
            starts.push((next.seq, units_for(size)));
            next = CommitId { seq: next.seq + units_for(size), commit: next.commit + 1, ..next };
        }
        let lost = victim.index(sizes.len() - 1);
        let (start, count) = starts[lost];
        let unit = start + victim.index(count as usize) as u64;
        place(&mut journal, &[0; PAGE_SIZE], unit);
        let found = scan(&UUID, &journal, from);
        prop_assert_eq!(found.commits.len(), lost);
        prop_assert!(found.damaged);
    }

    #[test]
    fn hostile_journals_never_panic(
        units in prop::collection::vec((0..16u32, 0..3u64, nasty(), 0..4u64, 0..40u32, any::<u32>(), any::<bool>()), 1..24),
        seq in prop_oneof![0..40u64, 0..=u64::MAX / 2],
        commit in 0..4u64,
        wild in any::<u64>(),
    ) {
        let total = units.len() as u64;
        let mut journal = bytes(wild, units.len() * PAGE_SIZE);
        let from = CommitId { epoch: 1, seq, commit };
        let _ = scan(&UUID, &journal, from);
        for (i, (flags, epoch, number, commit, len, commit_crc, near)) in units.into_iter().enumerate() {
            let unit = &mut journal[i * PAGE_SIZE..(i + 1) * PAGE_SIZE];
            // Half of the units carry a sequence number that belongs there.
            let here = seq - seq % total + i as u64;
            let number = if near { here } else { number };
            let len = if len == 39 { u32::MAX } else if len > 30 { UNIT_PAYLOAD as u32 } else { len };
            put_u32(unit, 4, flags);
            put_u64(unit, 8, epoch);
            put_u64(unit, 16, number);
            put_u64(unit, 24, commit);
            put_u32(unit, 32, len);
            let payload = unit[48..48 + (len as usize).min(UNIT_PAYLOAD)].to_vec();
            let right = checksum::seeded(&UUID, checksum::kind::COMMIT, commit, &[&payload]);
            put_u32(unit, 36, if near { right } else { commit_crc });
            let crc = checksum::seeded(&UUID, checksum::kind::JOURNAL_UNIT, number, &[&unit[4..]]);
            put_u32(unit, 0, crc);
            if let Some(read) = decode_unit(&UUID, unit) {
                prop_assert!(read.payload.len() <= UNIT_PAYLOAD);
            }
        }
        let found = scan(&UUID, &journal, from);
        prop_assert!(found.next_seq - from.seq <= total, "more than one lap");
        prop_assert!(found.commits.iter().map(Vec::len).sum::<usize>() <= journal.len());
        prop_assert_eq!(found.next_commit - from.commit, found.commits.len() as u64);
        for payload in &found.commits {
            let mut rest = payload.as_slice();
            while !rest.is_empty() && Record::decode(&mut rest).is_ok() {}
        }
    }

    #[test]
    fn records_take_any_bytes_and_have_one_encoding(
        seed in any::<u64>(),
        kind in 0..9u8,
        flag in 0..3u8,
        region in 0..14u16,
        count in prop_oneof![0..5u32, any::<u32>(), (0..200u32).prop_map(|n| n * 512)],
        first in nasty(),
        tail in 0..5000usize,
    ) {
        let mut payload = vec![kind, flag];
        payload.extend_from_slice(&region.to_le_bytes());
        payload.extend_from_slice(&count.to_le_bytes());
        payload.extend_from_slice(&first.to_le_bytes());
        payload.extend_from_slice(&bytes(seed, tail));
        let mut rest = payload.as_slice();
        while !rest.is_empty() {
            let whole = rest;
            let Ok(record) = Record::decode(&mut rest) else {
                prop_assert_eq!(rest, whole, "an error takes nothing");
                break;
            };
            let mut again = Vec::new();
            record.encode(&mut again);
            prop_assert_eq!(&again[..], &whole[..whole.len() - rest.len()]);
            match record {
                Record::Bits { region, first, count, .. } => {
                    prop_assert!(matches!(region, RegionKind::Bitmap | RegionKind::OwnBits));
                    prop_assert!(count > 0 && first.checked_add(count.into()).is_some());
                }
                Record::Entries { region, .. } => prop_assert!(matches!(region, RegionKind::Table | RegionKind::OriginIds)),
                Record::EntryRun { region, value, count, step, .. } => {
                    prop_assert!(matches!(region, RegionKind::Table | RegionKind::OriginIds));
                    let last = u64::from(value) + u64::from(step) * u64::from(count - 1);
                    prop_assert_eq!(last >> 31, u64::from(value >> 31), "the mark changes within a run");
                }
                Record::Carried { guest, data } => {
                    prop_assert!(guest % 512 == 0 && data.len() % 512 == 0 && data.len() <= CARRIED_MAX as usize && !data.is_empty());
                }
                Record::Reach(_) | Record::Confirm(_) => {}
            }
        }
    }
}

#[test]
fn each_number_of_a_unit_decides() {
    let from = CommitId { epoch: 4, seq: 21, commit: 6 };
    let try_second = |id: CommitId, granule: usize, filler_of: u64| {
        let mut journal = vec![0; 16 * PAGE_SIZE];
        let mut first = encode_commit(&UUID, from, b"one", granule);
        if let Some(filler) = first.get_mut(PAGE_SIZE..2 * PAGE_SIZE) {
            put_u64(filler, 24, filler_of);
            let crc = checksum::seeded(&UUID, checksum::kind::JOURNAL_UNIT, 22, &[&filler[4..]]);
            put_u32(filler, 0, crc);
        }
        place(&mut journal, &first, from.seq);
        // Where the second commit belongs, whatever sequence number it carries.
        place(&mut journal, &encode_commit(&UUID, id, b"two", PAGE_SIZE), from.seq + (granule / PAGE_SIZE) as u64);
        scan(&UUID, &journal, from).commits.len()
    };
    let right = CommitId { epoch: 4, seq: 22, commit: 7 };
    assert_eq!(try_second(right, PAGE_SIZE, 0), 2);
    assert_eq!(try_second(CommitId { epoch: 3, ..right }, PAGE_SIZE, 0), 1);
    assert_eq!(try_second(CommitId { epoch: 5, ..right }, PAGE_SIZE, 0), 1);
    assert_eq!(try_second(CommitId { seq: 6, ..right }, PAGE_SIZE, 0), 1);
    assert_eq!(try_second(CommitId { seq: 38, ..right }, PAGE_SIZE, 0), 1);
    assert_eq!(try_second(CommitId { commit: 6, ..right }, PAGE_SIZE, 0), 1);
    assert_eq!(try_second(CommitId { commit: 8, ..right }, PAGE_SIZE, 0), 1);
    // Behind a filler: the filler's own commit number counts as well.
    let behind = CommitId { seq: 23, ..right };
    assert_eq!(try_second(behind, 2 * PAGE_SIZE, 6), 2);
    assert_eq!(try_second(behind, 2 * PAGE_SIZE, 5), 1);
}

#[test]
fn a_commit_needs_its_first_and_its_last_unit() {
    let id = CommitId { epoch: 1, seq: 0, commit: 3 };
    for (flags, commits) in [(3, 1), (2, 0), (1, 0), (0, 0)] {
        let mut unit = encode_commit(&UUID, id, b"payload", PAGE_SIZE);
        put_u32(&mut unit, 4, flags);
        let crc = checksum::seeded(&UUID, checksum::kind::JOURNAL_UNIT, 0, &[&unit[4..]]);
        put_u32(&mut unit, 0, crc);
        let mut journal = vec![0; 8 * PAGE_SIZE];
        place(&mut journal, &unit, 0);
        assert_eq!(scan(&UUID, &journal, id).commits.len(), commits, "flags {flags}");
    }
}

#[test]
fn page_map_ranges_do_not_wrap() {
    let mut header = example();
    header.region_mut(RegionKind::Bitmap).as_mut().unwrap().map_first = u64::MAX;
    assert_eq!(Header::decode(&header.uuid, 1, &header.encode(1)).unwrap_err().field, "page map");
    // Two regions that share a bit.
    let mut header = example();
    *header.region_mut(RegionKind::Profile) = Some(Region { offset: 0x5_0000, length: 8192, generation: 1, map_first: 0, count_sum: 0 });
    assert_eq!(Header::decode(&header.uuid, 1, &header.encode(1)).unwrap_err().field, "page map");
    header.region_mut(RegionKind::Profile).as_mut().unwrap().map_first = 1;
    header.validate().unwrap();
}

#[test]
fn a_region_without_its_feature_is_refused() {
    for kind in RegionKind::ALL.into_iter().filter(|kind| kind.feature() != 0) {
        let mut header = example();
        *header.region_mut(kind) = Some(Region { offset: 0x5_0000, length: 8192, generation: 1, map_first: 0, count_sum: 0 });
        let error = Header::decode(&header.uuid, 1, &header.encode(1)).unwrap_err();
        assert!(error.detail.contains("feature"), "{kind:?}: {error}");
    }
}

#[test]
fn the_example_journal_shows_the_next_commit_number() {
    // Ties the numbers of a new image (FMT-131) to what `scan` expects.
    let header = example();
    let journal = vec![0; header.region(RegionKind::Journal).unwrap().length as usize];
    let from = CommitId { epoch: header.epoch, seq: header.first_seq, commit: header.first_commit };
    let found = scan(&header.uuid, &journal, from);
    assert_eq!((found.commits.len(), found.next_seq, found.next_commit, found.damaged), (0, 0, 1, false));
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rot: flipped bits, bytes and sectors; files of other lengths.

use crate::common::*;
use crate::samples::*;
use fvd_engine::Kind;

/// Whether a damaged image may be answered so.
///
/// Rot in the journal's last commit looks like a cut in it, and nothing in a file tells the two
/// apart: only there, older data is right.
fn fine(sample: &Sample, place: &str, outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Refused(Kind::Corrupt | Kind::Invalid | Kind::Unsupported) | Outcome::Right => true,
        Outcome::Partly => place == "bitmap",
        Outcome::Older => sample.older.is_some() && place == "journal",
        _ => false,
    }
}

/// A read-only open shows what good pages speak of, also where recovery cannot go on, and of a damaged
/// journal an older state, and says so in the log.
fn fine_read_only(sample: &Sample, place: &str, bytes: &Store, outcome: &Outcome) -> bool {
    if fine(sample, place, outcome) || *outcome == Outcome::Partly {
        return true;
    }
    if place != "journal" || !matches!(outcome, Outcome::Wrong(_)) {
        return false;
    }
    let config = fvd_engine::Config { read_only: true, ..fvd_engine::Config::default() };
    let sim = sim::Sim::try_open(bytes, Some(sample.base.clone()), sim::limits(1), config).unwrap();
    let log = sim.world.log.borrow().join("\n");
    sim.close();
    log.contains("the journal is damaged")
}

fn sweep(damage: impl Fn(&mut Vec<u8>, u64, &mut Rng), step: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut rng = Rng::new(99);
    let (mut tried_number, mut refused) = (0u64, 0u64);
    for sample in [closed(), cut(), torn()] {
        for (place, start, len) in sample.structures() {
            let mut at = 0;
            while at < len {
                let page = (start + at) / 4096 * 4096;
                let mut content = vec![0; 4096];
                sample.bytes.read(page, &mut content);
                damage(&mut content, (start + at) % 4096, &mut rng);
                let mut bytes = sample.bytes.clone();
                bytes.write(page, &content);
                for read_only in [true, false] {
                    let outcome = tried(&bytes, &sample, read_only);
                    let ok = match &outcome {
                        Ok(outcome) if read_only => fine_read_only(&sample, place, &bytes, outcome),
                        Ok(outcome) => fine(&sample, place, outcome),
                        Err(_) => false,
                    };
                    tried_number += 1;
                    refused += u64::from(matches!(outcome, Ok(Outcome::Refused(_))));
                    if !ok {
                        wrong.push(format!("{}: {place} + {at}, read-only {read_only}: {outcome:?}", sample.name));
                    }
                }
                // The heads of structures byte by byte.
                at += if at % 4096 < 48 { 1 + rng.below(3) } else { step };
            }
        }
    }
    assert!(refused * 50 > tried_number, "damage is hardly ever noticed: {refused} of {tried_number}");
    wrong
}

#[test]
fn single_bits_anywhere() {
    none(&sweep(|page, at, rng| page[at as usize] ^= 1 << rng.below(8), 89));
}

#[test]
fn single_bytes_anywhere() {
    none(&sweep(|page, at, rng| page[at as usize] = page[at as usize].wrapping_add(1 + rng.below(255) as u8), 131));
}

#[test]
fn sectors_lost_or_overwritten() {
    none(&{
        let sector = |page: &mut Vec<u8>, at: u64| {
            let start = at as usize / 512 * 512;
            start..(start + 512).min(page.len())
        };
        let mut wrong = Vec::new();
        for (name, damage) in
            [("zero", (|s, _| s.fill(0)) as fn(&mut [u8], &mut Rng)), ("ones", |s, _| s.fill(0xff)), ("noise", |s, rng| s.fill_with(|| rng.next() as u8))]
        {
            let found = sweep_sectors(|page, at, rng| {
                let range = sector(page, at);
                damage(&mut page[range], rng);
            });
            wrong.extend(found.into_iter().map(|f| format!("{name}: {f}")));
        }
        wrong
    });
}

fn sweep_sectors(damage: impl Fn(&mut Vec<u8>, u64, &mut Rng)) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut rng = Rng::new(7);
    for sample in [closed(), cut(), torn()] {
        for (place, start, len) in sample.structures() {
            for at in (0..len).step_by(512) {
                let page = (start + at) / 4096 * 4096;
                let mut content = vec![0; 4096];
                sample.bytes.read(page, &mut content);
                damage(&mut content, (start + at) % 4096, &mut rng);
                let mut bytes = sample.bytes.clone();
                bytes.write(page, &content);
                for read_only in [true, false] {
                    let outcome = tried(&bytes, &sample, read_only);
                    let ok = match &outcome {
                        Ok(outcome) if read_only => fine_read_only(&sample, place, &bytes, outcome),
                        Ok(outcome) => fine(&sample, place, outcome),
                        Err(_) => false,
                    };
                    if !ok {
                        wrong.push(format!("{}: {place} + {at}, read-only {read_only}: {outcome:?}", sample.name));
                    }
                }
            }
        }
    }
    wrong
}

fn check_finds(bytes: &Store, sample: &Sample) -> bool {
    let sim = sim::Sim::open(bytes, Some(sample.base.clone()));
    let (corruptions, findings) = sim.check();
    sim.crash();
    corruptions > 0 && findings.iter().any(|f| f.contains("a write was lost"))
}

/// Whole pages that stand in another's place: misdirected writes, and pages of another image.
#[test]
fn pages_in_each_others_place() {
    none(&{
        let mut wrong = Vec::new();
        let foreign = {
            let image = sim::create(sim::over_base(SIZE), Some(base_image(SIZE / 512)), sim::limits(1)).unwrap();
            // Another seed would be another UUID: the sample's world is the same, so change it.
            let mut header = header_of(&image);
            header.uuid[0] ^= 1;
            header
        };
        for sample in [closed(), cut(), torn()] {
            let places: Vec<(&str, u64)> =
                sample.structures().into_iter().flat_map(|(name, start, len)| (0..len / 4096).map(move |i| (name, start + i * 4096))).collect();
            for &(place, to) in &places {
                for &(source, from) in &places {
                    if from == to {
                        continue;
                    }
                    let mut page = vec![0; 4096];
                    sample.bytes.read(from, &mut page);
                    let mut bytes = sample.bytes.clone();
                    bytes.write(to, &page);
                    for read_only in [true, false] {
                        let outcome = tried(&bytes, &sample, read_only);
                        let ok = match &outcome {
                            Ok(outcome) if read_only => fine_read_only(&sample, place, &bytes, outcome),
                            Ok(outcome) => fine(&sample, place, outcome),
                            Err(_) => false,
                        };
                        // An older version of the same page: a write that was lost. Only the sum of
                        // the write counts tells, and only `check` reads all pages for it.
                        let lost = place == source || (source == "double-write area" && matches!(outcome, Ok(Outcome::Wrong(_))));
                        if !ok && !(lost && check_finds(&bytes, &sample)) {
                            wrong.push(format!("{}: {source} over {place} at {to}, read-only {read_only}: {outcome:?}", sample.name));
                        }
                    }
                }
            }
            for (copy, at) in [(1, 4096), (2, 128 << 10)] {
                let mut bytes = sample.bytes.clone();
                bytes.write(at, &foreign.encode(copy));
                let outcome = tried(&bytes, &sample, false);
                if !outcome.as_ref().is_ok_and(|o| fine(&sample, "header", o)) {
                    wrong.push(format!("{}: foreign header copy {copy}: {outcome:?}", sample.name));
                }
            }
        }
        wrong
    });
}

#[test]
fn files_of_any_length() {
    none(&{
        let mut wrong = Vec::new();
        for sample in [closed(), cut(), torn()] {
            let full = sample.header.file_length_min();
            let mut lengths: Vec<u64> = (0..200).collect();
            lengths.extend((0..full).step_by(30_011));
            lengths.extend(sample.structures().into_iter().flat_map(|(_, start, len)| [start, start + 1, start + 511, start + len - 1, start + len]));
            lengths.extend([full - 1, full - 512, full - 4096]);
            for len in lengths.into_iter().filter(|&l| l < full) {
                let mut bytes = sample.bytes.clone();
                bytes.resize(len);
                for read_only in [true, false] {
                    match tried(&bytes, &sample, read_only) {
                        Ok(Outcome::Refused(Kind::Corrupt | Kind::Invalid)) => {}
                        other => wrong.push(format!("{}: {len} of {full} bytes, read-only {read_only}: {other:?}", sample.name)),
                    }
                }
            }
            // Longer is tolerated.
            let mut bytes = sample.bytes.clone();
            bytes.resize(full.next_multiple_of(4096) + 12_345);
            let outcome = tried(&bytes, &sample, false);
            if outcome != Ok(Outcome::Right) {
                wrong.push(format!("{}: a longer file: {outcome:?}", sample.name));
            }
        }
        wrong
    });
}

#[test]
fn what_is_no_fvd_image_is_called_so() {
    for (bytes, word) in [(&b""[..], "not an FVD image"), (b"QFI\xfb\0\0\0\x03", "not an FVD image"), (b"\xa9\xf5\x43\x51", "version 1")] {
        let mut store = Store::default();
        store.write(0, bytes);
        for len in [bytes.len() as u64, 1 << 20] {
            store.resize(len);
            let error = sim::Sim::try_open(&store, None, sim::limits(1), fvd_engine::Config::default()).err().unwrap();
            assert!(error.text.contains(word), "{error}");
        }
    }
}

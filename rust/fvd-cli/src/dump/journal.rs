// SPDX-License-Identifier: MIT OR Apache-2.0
//! The journal as text: every valid unit, grouped into commits, and the records in them.

use super::{Image, Out, Runs};
use crate::{Failure, printable};
use fvd_format::checksum::{kind, seeded};
use fvd_format::journal::{Record, decode_unit};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::{Header, RegionKind};
use std::io::Write;

/// What is kept of a unit while the journal is read: 64 Ki units at most.
struct Unit {
    epoch: u64,
    seq: u64,
    commit: u64,
    place: u64,
    first: bool,
    last: bool,
    filler: bool,
    commit_crc: u32,
}

pub fn print(image: &Image, header: &Header, out: &mut Out) -> Result<(), Failure> {
    let Some(region) = header.region(RegionKind::Journal) else {
        writeln!(out, "journal: none")?;
        return Ok(());
    };
    // The header's rules bound the region to 256 MiB; `decode` has checked them.
    let places = region.pages();
    writeln!(out, "journal: {places} units at {}", region.offset)?;
    let mut units = Vec::new();
    let mut runs = Runs::new("place");
    for place in 0..places {
        let page = match image.page(region.offset + place * PAGE_SIZE as u64) {
            Ok(page) => page,
            Err(error) => {
                runs.add(place, &format!("BAD: {error}"), out)?;
                continue;
            }
        };
        let Some(unit) = decode_unit(&header.uuid, &page) else {
            let what = if page.iter().all(|&b| b == 0) { "empty" } else { "no valid unit of this image" };
            runs.add(place, what, out)?;
            continue;
        };
        if unit.seq % places != place {
            runs.add(place, &format!("BAD: unit {} does not belong here", unit.seq), out)?;
            continue;
        }
        units.push(Unit {
            epoch: unit.epoch,
            seq: unit.seq,
            commit: unit.commit,
            place,
            first: unit.first,
            last: unit.last,
            filler: unit.filler,
            commit_crc: unit.commit_crc,
        });
    }
    runs.end(out)?;
    units.sort_unstable_by_key(|unit| (unit.epoch, unit.seq));
    let mut expected = (!header.clean).then_some((header.first_seq, header.first_commit));
    let mut rest = &units[..];
    while let Some(unit) = rest.first() {
        let same = |next: &[Unit]| (next[1].epoch, next[1].commit, next[1].seq) == (unit.epoch, unit.commit, next[0].seq.wrapping_add(1));
        let count = 1 + rest.windows(2).take_while(|pair| same(pair)).count();
        let (commit, tail) = rest.split_at(count);
        rest = tail;
        print_commit(image, header, commit, &mut expected, out)?;
    }
    Ok(())
}

fn print_commit(image: &Image, header: &Header, units: &[Unit], expected: &mut Option<(u64, u64)>, out: &mut Out) -> Result<(), Failure> {
    let offset = header.region(RegionKind::Journal).map_or(0, |region| region.offset);
    let (head, end) = (&units[0], &units[units.len() - 1]);
    let mut payload = Vec::new();
    for unit in units.iter().filter(|unit| !unit.filler) {
        // Read a second time: in a live image the unit may be another one by now.
        if let Ok(page) = image.page(offset + unit.place * PAGE_SIZE as u64)
            && let Some(again) = decode_unit(&header.uuid, &page)
        {
            payload.extend_from_slice(again.payload);
        }
    }
    let data: Vec<&Unit> = units.iter().filter(|unit| !unit.filler).collect();
    let shaped = data.iter().enumerate().all(|(i, unit)| unit.first == (i == 0) && unit.last == (i + 1 == data.len()));
    let whole = shaped
        && data.last().is_some_and(|last| last.commit_crc == seeded(&header.uuid, kind::COMMIT, head.commit, &[&payload]));
    let counts = whole && head.epoch == header.epoch && *expected == Some((head.seq, head.commit));
    let state = match (whole, counts) {
        (_, true) => "whole, replayed at the next open",
        (true, false) => "whole, done with",
        (false, _) => "incomplete",
    };
    if counts {
        *expected = Some((end.seq.wrapping_add(1), head.commit.wrapping_add(1)));
    }
    let fillers = units.len() - data.len();
    let (places, bytes) = (format!("places {}..={}", head.place, end.place), payload.len());
    writeln!(
        out,
        "  commit {} of epoch {}: units {}..={}, {places}, {fillers} filler, {bytes} bytes: {state}",
        head.commit, head.epoch, head.seq, end.seq
    )?;
    if !data.first().is_some_and(|unit| unit.first) {
        // Records may begin anywhere: there is nothing to start decoding from.
        return Ok(());
    }
    let mut left = &payload[..];
    while !left.is_empty() {
        match Record::decode(&mut left) {
            Ok(record) => writeln!(out, "    {}", describe(&record))?,
            Err(error) => {
                writeln!(out, "    BAD: {} ({} bytes left)", printable(&error.to_string()), left.len())?;
                break;
            }
        }
    }
    Ok(())
}

fn describe(record: &Record<'_>) -> String {
    match record {
        Record::Bits { region, value, first, count } => {
            format!("bits {first}..={} of {region:?} = {}", first + u64::from(*count) - 1, u8::from(*value))
        }
        Record::Entries { region, first, values } => format!("entries {first}..={} of {region:?}", first + values.len() as u64 / 4 - 1),
        Record::EntryRun { region, first, count, value, step } => {
            format!("entries {first}..={} of {region:?} = {value} step {step}", first + u64::from(*count) - 1)
        }
        Record::Reach(reach) => format!("reach = {reach}"),
        Record::Carried { guest, data } => format!("data of guest bytes {guest}..{}", guest.saturating_add(data.len() as u64)),
        Record::Confirm(commit) => format!("commits up to {commit} are confirmed"),
    }
}

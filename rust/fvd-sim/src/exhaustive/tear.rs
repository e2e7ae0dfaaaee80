// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every file that a power cut may leave: which of the changes that are not durable survive, and
//! how the survivors are torn.
//!
//! With `n` changes: up to [`ALL`] of them, each subset; above, none, all, each alone, all but
//! each, and each beginning. On top of that tears: up to [`PRODUCT`] changes, every survivor in
//! every way at once; up to [`ONE_EACH`], each subset with any one survivor torn; above, each
//! change torn when alone, after all before it, and among all.

use crate::content::SECTOR;
use crate::disk::{Change, apply};
use crate::prng::mix;
use crate::store::{PAGE, Store};

/// Most changes of which every subset is tried.
pub const ALL: usize = 10;
/// Most changes of which all are torn at once.
pub const PRODUCT: usize = 2;
/// Most changes for which each subset is tried with any one survivor torn.
pub const ONE_EACH: usize = 6;

/// What a page is full of that the cut destroyed.
const DESTROYED: u8 = 0xdb;

/// A file and its hash.
#[derive(Clone)]
pub struct Hashed {
    /// The bytes.
    pub store: Store,
    /// Equal files have equal hashes.
    pub hash: u64,
}

/// Hash of a page at its place; zero for a page of zeroes.
pub fn page_hash(index: u64, page: &[u8; PAGE]) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    let mut any = 0;
    for piece in page.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(piece.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            any |= word;
            *lane = (*lane ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
        }
    }
    if any == 0 { 0 } else { lanes.iter().fold(mix(index), |hash, lane| mix(hash ^ lane)) }
}

impl Hashed {
    /// A file with its hash.
    pub fn new(store: Store) -> Self {
        let hash = Self::pages_hash(&store, 0, u64::MAX) ^ mix(store.len());
        Self { store, hash }
    }

    /// Hash of pages `first..end`.
    fn pages_hash(store: &Store, first: u64, end: u64) -> u64 {
        let pages = store.pages(store.len());
        let inside = pages.into_iter().filter(|p| (first..end).contains(p));
        inside.fold(0, |hash, p| hash ^ store.page(p).map_or(0, |bytes| page_hash(p, bytes)))
    }

    /// Hash of everything but the bytes from `from` to `to`.
    pub fn hash_without(&self, from: u64, to: u64) -> u64 {
        let (first, end) = (from / PAGE as u64, to.div_ceil(PAGE as u64));
        self.hash ^ Self::pages_hash(&self.store, first, end)
    }

    /// A copy, changed.
    fn with(&self, change: &Change) -> Self {
        let mut out = self.clone();
        let (offset, len) = match change {
            Change::Bytes(offset, bytes) => (*offset, bytes.len() as u64),
            Change::Zero(offset, len) => (*offset, *len),
            Change::Length(len) => (*len, self.store.len().saturating_sub(*len)),
        };
        let (first, end) = (offset / PAGE as u64, (offset + len).div_ceil(PAGE as u64));
        let part = |store: &Store| {
            if end - first > 64 {
                return Self::pages_hash(store, first, end);
            }
            (first..end).fold(0, |hash, p| hash ^ store.page(p).map_or(0, |bytes| page_hash(p, bytes)))
        };
        out.hash ^= part(&out.store) ^ mix(out.store.len());
        apply(&mut out.store, change);
        out.hash ^= part(&out.store) ^ mix(out.store.len());
        out
    }
}

/// What survives of one change, in several ways: whole first, then torn.
type Ways = Vec<Vec<Change>>;

/// The ways in which `change` may survive. `metadata` also loses whole pages: 4 KiB that are neither
/// old nor new.
fn ways(change: &Change, metadata: bool) -> Ways {
    let mut out = vec![vec![change.clone()]];
    let piece = |bytes: &[u8], from: usize, to: usize, at: u64| Change::Bytes(at + from as u64, bytes[from..to].to_vec().into());
    match change {
        Change::Bytes(at, bytes) if bytes.len() > SECTOR => {
            let half = (bytes.len() / SECTOR).div_ceil(2) * SECTOR;
            out.push(vec![piece(bytes, 0, half, *at)]);
            out.push(vec![piece(bytes, half, bytes.len(), *at)]);
            if metadata && bytes.len() % PAGE == 0 && at % PAGE as u64 == 0 {
                let gone = |page: usize| Change::Bytes(at + (page * PAGE) as u64, vec![DESTROYED; PAGE].into());
                let middle = bytes.len() / PAGE / 2;
                out.push(if middle > 0 { vec![piece(bytes, 0, middle * PAGE, *at), gone(middle)] } else { vec![gone(0)] });
                if middle > 0 {
                    out.push(vec![gone(0), piece(bytes, PAGE, bytes.len(), *at)]);
                }
            }
        }
        Change::Zero(at, len) if *len > SECTOR as u64 => {
            let half = (len / SECTOR as u64).div_ceil(2) * SECTOR as u64;
            out.push(vec![Change::Zero(*at, half)]);
            out.push(vec![Change::Zero(at + half, len - half)]);
        }
        _ => {}
    }
    out
}

/// Changes of which any may be lost, and how each may survive.
pub struct Cut {
    ways: Vec<Ways>,
}

impl Cut {
    /// `is_metadata` says whether a range of the file is metadata.
    pub fn new(changes: &[Change], is_metadata: impl Fn(u64, u64) -> bool) -> Self {
        let metadata = |change: &Change| matches!(change, Change::Bytes(at, bytes) if is_metadata(*at, bytes.len() as u64));
        Self { ways: changes.iter().map(|change| ways(change, metadata(change))).collect() }
    }

    /// Calls `f` with each file that the cut may leave of `stable`, and with what each change came
    /// to: `.` lost, `w` whole, a digit: torn in that way. Some files come more than once.
    pub fn each<E>(&self, stable: &Hashed, f: &mut dyn FnMut(&Hashed, &str) -> Result<(), E>) -> Result<(), E> {
        let n = self.ways.len();
        if n > ALL {
            for choice in self.sample() {
                self.build(stable, &choice, f)?;
            }
            return Ok(());
        }
        let torn = if n <= PRODUCT { n } else { usize::from(n <= ONE_EACH) };
        self.descend(stable, &mut Vec::new(), torn, f)?;
        if n > ONE_EACH {
            for choice in self.tears() {
                self.build(stable, &choice, f)?;
            }
        }
        Ok(())
    }

    fn descend<E>(&self, file: &Hashed, chosen: &mut Vec<usize>, torn: usize, f: &mut dyn FnMut(&Hashed, &str) -> Result<(), E>) -> Result<(), E> {
        let Some(ways) = self.ways.get(chosen.len()) else { return f(file, &spell(chosen)) };
        for way in 0..=ways.len() {
            let is_torn = usize::from(way > 1);
            if is_torn > torn {
                break;
            }
            chosen.push(way);
            if way == 0 {
                self.descend(file, chosen, torn, f)?;
            } else {
                let next = ways[way - 1].iter().fold(file.clone(), |file, change| file.with(change));
                self.descend(&next, chosen, torn - is_torn, f)?;
            }
            chosen.pop();
        }
        Ok(())
    }

    fn build<E>(&self, stable: &Hashed, choice: &[usize], f: &mut dyn FnMut(&Hashed, &str) -> Result<(), E>) -> Result<(), E> {
        let mut file = stable.clone();
        for (ways, way) in self.ways.iter().zip(choice).filter(|(_, way)| **way > 0) {
            file = ways[way - 1].iter().fold(file, |file, change| file.with(change));
        }
        f(&file, &spell(choice))
    }

    /// Where there are too many changes for every subset.
    fn sample(&self) -> Vec<Vec<usize>> {
        let n = self.ways.len();
        let mut out = vec![vec![0; n], vec![1; n]];
        for at in 0..n {
            out.push((0..n).map(|i| usize::from(i == at)).collect());
            out.push((0..n).map(|i| usize::from(i != at)).collect());
            out.push((0..n).map(|i| usize::from(i <= at)).collect());
        }
        out.extend(self.tears());
        out
    }

    /// Each change torn: alone, after all before it, among all.
    fn tears(&self) -> Vec<Vec<usize>> {
        let n = self.ways.len();
        let mut out = Vec::new();
        for at in 0..n {
            for way in 2..=self.ways[at].len() {
                let with = |others: &dyn Fn(usize) -> bool| (0..n).map(|i| if i == at { way } else { usize::from(others(i)) }).collect();
                out.extend([with(&|_| false), with(&|i| i < at), with(&|_| true)]);
            }
        }
        out
    }
}

fn spell(chosen: &[usize]) -> String {
    chosen.iter().map(|way| match way { 0 => '.', 1 => 'w', n => char::from(b'0' + *n as u8) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn files(changes: &[Change]) -> (usize, BTreeSet<u64>) {
        let mut stable = Store::default();
        stable.write(0, &[9; 3 * PAGE]);
        let (mut count, mut hashes) = (0, BTreeSet::new());
        let cut = Cut::new(changes, |at, len| at + len <= 2 * PAGE as u64);
        let mut f = |file: &Hashed, _: &str| -> Result<(), ()> {
            assert_eq!(file.hash, Hashed::new(file.store.clone()).hash);
            count += 1;
            hashes.insert(file.hash);
            Ok(())
        };
        cut.each(&Hashed::new(stable), &mut f).unwrap();
        (count, hashes)
    }

    #[test]
    fn all_that_may_be_left_is_tried() {
        let bytes = |at: usize, n: usize| Change::Bytes((at * SECTOR) as u64, vec![1; n * SECTOR].into());
        // Lost, whole, two halves; of two pages of metadata also two ways of losing one.
        assert_eq!(files(&[bytes(20, 2)]).0, 4);
        assert_eq!(files(&[bytes(0, 16)]).0, 6);
        assert_eq!(files(&[bytes(0, 16), Change::Length(4 * PAGE as u64)]).1.len(), 12);
        assert_eq!(files(&[bytes(17, 1), Change::Zero(0, PAGE as u64)]).1.len(), 8);
        let three = [bytes(16, 2), bytes(18, 2), bytes(20, 2)];
        // 8 subsets; 3 changes × 4 subsets of the others × 2 tears.
        assert_eq!(files(&three).0, 8 + 3 * 4 * 2);
        let many: Vec<_> = (0..11).map(|i| bytes(i, 1)).collect();
        // The first beginning is the first alone, the last two are all.
        assert_eq!(files(&many).1.len(), 2 + 11 * 3 - 3);
    }
}

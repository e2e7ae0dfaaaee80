// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes of a file, most of them zero. Clones share their pages, so that a snapshot at every power
//! cut costs next to nothing.

use crate::prng::mix;
use std::rc::Rc;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Pages in a leaf.
const LEAF: usize = 64;

type Page = [u8; PAGE];
type Leaf = [Option<Rc<Page>>; LEAF];

/// A sparse file.
#[derive(Clone, Default)]
pub struct Store {
    leaves: Vec<Option<Rc<Leaf>>>,
    len: u64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({} bytes)", self.len)
    }
}

/// The files of an image. Where guest data lies in the image file, there is no data file: it stays empty.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The image file.
    pub image: Store,
    /// The data file.
    pub data: Store,
}

impl From<Store> for Files {
    fn from(image: Store) -> Self {
        Self { image, data: Store::default() }
    }
}

impl Files {
    /// See [`Store::hash_beside`].
    pub fn hash_beside(&self, other: &Self) -> u64 {
        self.image.hash_beside(&other.image) ^ mix(self.data.hash_beside(&other.data))
    }
}

/// Calls `f(page, byte in page, bytes, bytes done)` for each page that `offset…offset+len` touches.
fn pieces(offset: u64, len: usize, mut f: impl FnMut(u64, usize, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let within = (at % PAGE as u64) as usize;
        let n = (len - done).min(PAGE - within);
        f(at / PAGE as u64, within, n, done);
        done += n;
    }
}

impl Store {
    /// Bytes in the file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Page `index`, unless it is zero.
    pub fn page(&self, index: u64) -> Option<&Page> {
        let leaf = self.leaves.get((index / LEAF as u64) as usize)?.as_ref()?;
        leaf[(index % LEAF as u64) as usize].as_deref()
    }

    fn slot(&mut self, index: u64) -> &mut Option<Rc<Page>> {
        let at = (index / LEAF as u64) as usize;
        if at >= self.leaves.len() {
            self.leaves.resize(at + 1, None);
        }
        let leaf = self.leaves[at].get_or_insert_with(|| Rc::new([const { None }; LEAF]));
        &mut Rc::make_mut(leaf)[(index % LEAF as u64) as usize]
    }

    /// Fills `to` from byte `offset` on, with zeroes past the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        pieces(offset, to.len(), |page, within, n, done| match self.page(page) {
            Some(bytes) => to[done..done + n].copy_from_slice(&bytes[within..within + n]),
            None => to[done..done + n].fill(0),
        });
    }

    /// `len` bytes from `offset` on.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read(offset, &mut out);
        out
    }

    /// Writes, extending the file if need be.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        pieces(offset, from.len(), |page, within, n, done| {
            let piece = &from[done..done + n];
            let slot = self.slot(page);
            if n == PAGE {
                match slot.as_mut().and_then(Rc::get_mut) {
                    Some(bytes) => bytes.copy_from_slice(piece),
                    None => *slot = Some(Rc::new(piece.try_into().expect("a page"))),
                }
            } else {
                let bytes = slot.get_or_insert_with(|| Rc::new([0; PAGE]));
                Rc::make_mut(bytes)[within..within + n].copy_from_slice(piece);
            }
        });
        self.len = self.len.max(offset + from.len() as u64);
    }

    /// Zeroes a range, extending the file if need be.
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.len = self.len.max(offset + len);
        let mut at = offset;
        while at < offset + len {
            let page = at / PAGE as u64;
            if self.leaves.get((page / LEAF as u64) as usize).is_none_or(Option::is_none) {
                // Nothing in the whole leaf.
                at = (page / LEAF as u64 + 1) * (LEAF * PAGE) as u64;
                continue;
            }
            let within = (at % PAGE as u64) as usize;
            let n = (offset + len - at).min((PAGE - within) as u64) as usize;
            if self.page(page).is_some() {
                let slot = self.slot(page);
                match slot {
                    Some(bytes) if n < PAGE => Rc::make_mut(bytes)[within..within + n].fill(0),
                    _ => *slot = None,
                }
            }
            at += n as u64;
        }
    }

    /// Sets the length; what is cut off is gone, what is gained is zero.
    pub fn resize(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
            self.leaves.truncate(len.div_ceil((LEAF * PAGE) as u64) as usize);
        }
        self.len = len;
    }

    /// Fills whole pages with `byte`, all of them one page in memory.
    pub fn fill_pages(&mut self, offset: u64, len: u64, byte: u8) {
        let page = Rc::new([byte; PAGE]);
        for index in offset / PAGE as u64..(offset + len).div_ceil(PAGE as u64) {
            *self.slot(index) = Some(page.clone());
        }
        self.len = self.len.max(offset + len);
    }

    /// Numbers of the pages that are not known to be zero, below byte `end`.
    pub fn pages(&self, end: u64) -> Vec<u64> {
        let most = end.div_ceil(PAGE as u64);
        let mut out = Vec::new();
        for (i, leaf) in self.leaves.iter().enumerate() {
            for j in (0..LEAF).filter(|j| leaf.as_ref().is_some_and(|leaf| leaf[*j].is_some())) {
                out.extend(Some((i * LEAF + j) as u64).filter(|p| *p < most));
            }
        }
        out
    }

    /// The same for files that have most of their pages in common with `other`, memory included, as a
    /// copy of it that was changed has: what is alike is not looked at.
    pub fn hash_beside(&self, other: &Self) -> u64 {
        let mut hash = mix(self.len);
        let none = None;
        for at in 0..self.leaves.len().max(other.leaves.len()) {
            let [mine, theirs] = [self, other].map(|store| store.leaves.get(at).unwrap_or(&none).as_ref());
            if mine.map(Rc::as_ptr) == theirs.map(Rc::as_ptr) {
                continue;
            }
            for i in 0..LEAF {
                let [mine, theirs] = [mine, theirs].map(|leaf| leaf.and_then(|leaf| leaf[i].as_ref()));
                if mine.map(Rc::as_ptr) != theirs.map(Rc::as_ptr) {
                    let [mine, theirs] = [mine, theirs].map(|page| page.map_or(&[0; PAGE], |page| &**page));
                    if mine != theirs {
                        hash = hash_page(hash ^ (at * LEAF + i) as u64, mine);
                    }
                }
            }
        }
        hash
    }

    /// A hash of length and content: equal files have equal hashes, however they came about.
    pub fn hash(&self) -> u64 {
        let mut hash = mix(self.len);
        for index in self.pages(self.len) {
            let page = self.page(index).expect("listed");
            if page.iter().any(|b| *b != 0) {
                hash = hash_page(hash ^ index, page);
            }
        }
        hash
    }
}

fn hash_page(hash: u64, page: &Page) -> u64 {
    page.chunks_exact(8).fold(mix(hash), |hash, word| {
        (hash ^ u64::from_le_bytes(word.try_into().expect("eight bytes"))).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_do_not_change() {
        let mut store = Store::default();
        store.write(4000, &[7; 5000]);
        let before = store.clone();
        store.zero(4096, 4096);
        store.write(1 << 20, &[1]);
        assert_eq!((before.len(), store.len()), (9000, (1 << 20) + 1));
        assert_eq!(before.bytes(3999, 3), [0, 7, 7]);
        assert_eq!(before.bytes(4096, 2), [7, 7]);
        assert_eq!(store.bytes(4095, 3), [7, 0, 0]);
        assert_eq!(store.bytes(8191, 2), [0, 7]);
        let hash = |store: &Store| store.hash_beside(&before);
        assert_eq!(hash(&before), before.clone().hash_beside(&before));
        let mut same = before.clone();
        same.write(4096, &[7; 4096]);
        assert_eq!(hash(&same), hash(&before));
        assert_ne!(hash(&store), hash(&before));
        same.write(5000, &[8]);
        assert_ne!(hash(&same), hash(&before));
        store.resize(4097);
        store.resize(9000);
        assert_eq!(store.bytes(8192, 2), [0, 0]);
        assert_ne!(store.hash(), before.hash());
        store.write(4000, &[7; 5000]);
        assert_eq!(store.hash(), before.hash());
    }
}

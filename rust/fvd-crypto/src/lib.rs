// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encryption of guest data: AES-256-XTS (IEEE 1619) over data units of 512 bytes, tweak = guest
//! sector as a 128-bit little-endian number ("plain64"). `docs/format.md`, FMT-107.
//!
//! Whole sectors only, so ciphertext stealing never happens. Work goes in batches of 4 KiB across
//! data units, because the cipher behind it is several times faster on many blocks at once than on
//! the 32 blocks of one sector: tweaks of the whole batch, xor, one call, xor.
#![forbid(unsafe_code)]

use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16};
use zeroize::ZeroizeOnDrop;

/// Bytes of a data unit.
pub const SECTOR: usize = 512;
/// Bytes of a key: the data key, then the tweak key.
pub const KEY_SIZE: usize = 64;

const BLOCK: usize = 16;
const BLOCKS_PER_SECTOR: usize = SECTOR / BLOCK;
const BATCH_SECTORS: usize = 8;

type Block = Array<u8, U16>;

/// AES-256-XTS with one key. Both key schedules are wiped when it is dropped.
pub struct Xts {
    data: Aes256,
    tweak: Aes256,
}

impl ZeroizeOnDrop for Xts {}

// The marker above is true only while the cipher wipes itself.
const _: () = {
    const fn wipes_itself<T: ZeroizeOnDrop>() {}
    wipes_itself::<Aes256>();
};

impl std::fmt::Debug for Xts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Xts(..)")
    }
}

impl Xts {
    /// A cipher for `key`: 32 bytes of data key, 32 bytes of tweak key. The caller wipes its copy.
    pub fn new(key: &[u8; KEY_SIZE]) -> Self {
        let half = |part: &[u8]| Aes256::new_from_slice(part).expect("32 bytes are a key of AES-256");
        Self { data: half(&key[..KEY_SIZE / 2]), tweak: half(&key[KEY_SIZE / 2..]) }
    }

    /// Encrypts `data` in place; its first byte is the first byte of guest sector `first_sector`.
    ///
    /// # Panics
    /// If `data` is no multiple of 512 bytes or the last sector's number overflows.
    pub fn encrypt(&self, first_sector: u64, data: &mut [u8]) {
        self.run(first_sector, data, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts `data` in place; the inverse of [`encrypt`](Self::encrypt).
    ///
    /// # Panics
    /// As `encrypt`.
    pub fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        self.run(first_sector, data, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn run(&self, first_sector: u64, data: &mut [u8], cipher: impl Fn(&mut [Block])) {
        assert!(data.len().is_multiple_of(SECTOR), "only whole sectors can be encrypted");
        let count = (data.len() / SECTOR) as u64;
        assert!(count == 0 || first_sector.checked_add(count - 1).is_some(), "sector number overflows");
        let mut sector = first_sector;
        for batch in data.chunks_mut(BATCH_SECTORS * SECTOR) {
            let mut tweaks = [0u128; BATCH_SECTORS * BLOCKS_PER_SECTOR];
            let tweaks = &mut tweaks[..batch.len() / BLOCK];
            self.fill_tweaks(sector, tweaks);
            xor(batch, tweaks);
            let (blocks, rest) = Block::slice_as_chunks_mut(batch);
            debug_assert!(rest.is_empty());
            cipher(blocks);
            xor(batch, tweaks);
            sector = sector.wrapping_add(BATCH_SECTORS as u64);
        }
    }

    /// Tweaks of all blocks from `sector` on: the encrypted sector number, doubled from block to block.
    fn fill_tweaks(&self, sector: u64, tweaks: &mut [u128]) {
        let mut heads = [Block::default(); BATCH_SECTORS];
        let heads = &mut heads[..tweaks.len() / BLOCKS_PER_SECTOR];
        for (i, head) in heads.iter_mut().enumerate() {
            // Never overflows: `run` has checked the last one.
            head.0 = u128::from(sector + i as u64).to_le_bytes();
        }
        self.tweak.encrypt_blocks(heads);
        for (head, unit) in heads.iter().zip(tweaks.chunks_exact_mut(BLOCKS_PER_SECTOR)) {
            let mut tweak = u128::from_le_bytes(head.0);
            for slot in unit {
                *slot = tweak;
                tweak = double(tweak);
            }
        }
    }
}

/// Multiplication by x in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1, without a branch on secrets.
fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

fn xor(data: &mut [u8], tweaks: &[u128]) {
    for (block, tweak) in data.chunks_exact_mut(BLOCK).zip(tweaks) {
        let value = u128::from_le_bytes(block.try_into().expect("a block")) ^ tweak;
        block.copy_from_slice(&value.to_le_bytes());
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! AES-256-XTS against the vectors of IEEE 1619 and against an independent implementation.

use aes::Aes256;
use aes::cipher::KeyInit;
use fvd_crypto::{KEY_SIZE, SECTOR, Xts};
use proptest::prelude::*;
use xts_mode::{Xts128, get_tweak_default};

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    assert!(digits.len().is_multiple_of(2));
    digits
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

const KEY: &str = "
    2718281828459045235360287471352662497757247093699959574966967627
    3141592653589793238462643383279502884197169399375105820974944592";

/// IEEE Std 1619-2007, annex B, vectors 10, 11 and 14: sector number and ciphertext. The plaintext
/// of all three is 00 01 … ff, twice.
const VECTORS: [(u64, &str); 3] = [
    (
        0xff,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b
         5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd
         5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0
         c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca
         2a3e7a7d7df7b10355165c8b9a6d0a7de8b062c4500dc4cd120c0f7418dae3d0
         b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f
         93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec
         583e9645e07b8d9670655ba5bbcfecc6dc3966380ad8fecb17b6ba02469a020a
         84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1
         505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae
         9be69a2ffeceb1bec9de244fbe15992b11b77c040f12bd8f6a975a44a0f90c29
         a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac
         6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f
         645e8b7e9bfdef33943054ff84011493c27b3429eaedb4ed5376441a77ed4385
         1ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa
         773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
    ),
    (
        0xffff,
        "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11
         e1d0225438e093242d6db274fde801d4cae06f2092c728b2478559df58e837c2
         469ee4a4fa794e4bbc7f39bc026e3cb72c33b0888f25b4acf56a2a9804f1ce6d
         3d6e1dc6ca181d4b546179d55544aa7760c40d06741539c7e3cd9d2f6650b201
         3fd0eeb8c2b8e3d8d240ccae2d4c98320a7442e1c8d75a42d6e6cfa4c2eca179
         8d158c7aecdf82490f24bb9b38e108bcda12c3faf9a21141c3613b58367f922a
         aa26cd22f23d708dae699ad7cb40a8ad0b6e2784973dcb605684c08b8d6998c6
         9aac049921871ebb65301a4619ca80ecb485a31d744223ce8ddc2394828d6a80
         470c092f5ba413c3378fa6054255c6f9df4495862bbb3287681f931b687c888a
         bf844dfc8fc28331e579928cd12bd2390ae123cf03818d14dedde5c0c24c8ab0
         18bfca75ca096f2d531f3d1619e785f1ada437cab92e980558b3dce1474afb75
         bfedbf8ff54cb2618e0244c9ac0d3c66fb51598cd2db11f9be39791abe447c63
         094f7c453b7ff87cb5bb36b7c79efb0872d17058b83b15ab0866ad8a58656c5a
         7e20dbdf308b2461d97c0ec0024a2715055249cf3b478ddd4740de654f75ca68
         6e0d7345c69ed50cdc2a8b332b1f8824108ac937eb050585608ee734097fc090
         54fbff89eeaeea791f4a7ab1f9868294a4f9e27b42af8100cb9d59cef9645803",
    ),
    (
        0xff_ffff_ffff,
        "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23
         50eae7e96087c8a0db51ad290bd00c1ac1620857635bf246c176ab463be30b80
         8da548081ac847b158e1264be25bb0910bbc92647108089415d45fab1b3d2604
         e8a8eff1ae4020cfa39936b66827b23f371b92200be90251e6d73c5f86de5fd4
         a950781933d79a28272b782a2ec313efdfcc0628f43d744c2dc2ff3dcb66999b
         50c7ca895b0c64791eeaa5f29499fb1c026f84ce5b5c72ba1083cddb5ce45434
         631665c333b60b11593fb253c5179a2c8db813782a004856a1653011e93fb6d8
         76c18366dd8683f53412c0c180f9c848592d593f8609ca736317d356e13e2bff
         3a9f59cd9aeb19cd482593d8c46128bb32423b37a9adfb482b99453fbe25a41b
         f6feb4aa0bef5ed24bf73c762978025482c13115e4015aac992e5613a3b5c2f6
         85b84795cb6e9b2656d8c88157e52c42f978d8634c43d06fea928f2822e465aa
         6576e9bf419384506cc3ce3c54ac1a6f67dc66f3b30191e698380bc999b05abc
         e19dc0c6dcc2dd001ec535ba18deb2df1a101023108318c75dc98611a09dc48a
         0acdec676fabdf222f07e026f059b672b56e5cbc8e1d21bbd867dd9272120546
         81d70ea737134cdfce93b6f82ae22423274e58a0821cc5502e2d0ab4585e94de
         6975be5e0b4efce51cd3e70c25a1fbbbd609d273ad5b0d59631c531f6a0a57b9",
    ),
];

#[test]
fn vectors_of_ieee_1619() {
    let xts = Xts::new(&hex(KEY).try_into().unwrap());
    let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
    for (sector, cipher) in VECTORS {
        let mut data = plain.clone();
        xts.encrypt(sector, &mut data);
        assert_eq!(data, hex(cipher), "encrypting sector {sector:#x}");
        xts.decrypt(sector, &mut data);
        assert_eq!(data, plain, "decrypting sector {sector:#x}");
    }
}

/// The reference: one block at a time, one sector at a time.
fn reference(key: &[u8; KEY_SIZE], first_sector: u64, data: &mut [u8], encrypt: bool) {
    let half = |part: &[u8]| Aes256::new_from_slice(part).unwrap();
    let xts = Xts128::<Aes256>::new(half(&key[..32]), half(&key[32..]));
    if encrypt {
        xts.encrypt_area(data, SECTOR, first_sector.into(), get_tweak_default);
    } else {
        xts.decrypt_area(data, SECTOR, first_sector.into(), get_tweak_default);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn equals_the_reference(
        key in prop::collection::vec(any::<u8>(), KEY_SIZE),
        sector in prop_oneof![0..64u64, any::<u64>().prop_map(|s| s >> 9), Just(u64::from(u32::MAX) - 3)],
        sectors in 0..40usize,
        fill in any::<u64>(),
    ) {
        let key: [u8; KEY_SIZE] = key.try_into().unwrap();
        let mut state = fill | 1;
        let plain: Vec<u8> = (0..sectors * SECTOR)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        let xts = Xts::new(&key);
        let (mut ours, mut theirs) = (plain.clone(), plain.clone());
        xts.encrypt(sector, &mut ours);
        reference(&key, sector, &mut theirs, true);
        prop_assert_eq!(&ours, &theirs);
        reference(&key, sector, &mut ours, false);
        prop_assert_eq!(&ours, &plain);
        xts.decrypt(sector, &mut theirs);
        prop_assert_eq!(&theirs, &plain);
    }
}

#[test]
fn a_range_equals_its_sectors() {
    let xts = Xts::new(&hex(KEY).try_into().unwrap());
    let mut whole: Vec<u8> = (0..37 * SECTOR).map(|i| (i / 5) as u8).collect();
    let mut parts = whole.clone();
    xts.encrypt(1000, &mut whole);
    for (i, sector) in parts.chunks_exact_mut(SECTOR).enumerate() {
        xts.encrypt(1000 + i as u64, sector);
    }
    assert_eq!(whole, parts);
}

#[test]
fn the_last_sector_number_works_and_the_next_does_not() {
    let xts = Xts::new(&[7; KEY_SIZE]);
    let mut data = vec![1; 2 * SECTOR];
    xts.encrypt(u64::MAX - 1, &mut data);
    xts.decrypt(u64::MAX - 1, &mut data);
    assert_eq!(data, vec![1; 2 * SECTOR]);
    let caught = std::panic::catch_unwind(move || xts.encrypt(u64::MAX, &mut data));
    assert!(caught.is_err());
}

#[test]
fn a_part_of_a_sector_is_refused() {
    let xts = Xts::new(&[7; KEY_SIZE]);
    let caught = std::panic::catch_unwind(move || xts.encrypt(0, &mut vec![0; 511]));
    assert!(caught.is_err());
}

#[test]
fn debug_output_shows_no_key() {
    assert_eq!(format!("{:?}", Xts::new(&[0x41; KEY_SIZE])), "Xts(..)");
}

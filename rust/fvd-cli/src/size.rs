// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes as people write and read them.

const UNITS: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

/// Parses bytes with an optional suffix K, M, G, T, P or E (powers of 1024) and an optional
/// fraction: `1073741824`, `1G`, `1.5T`, `64KiB`.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: write bytes, or a number with K, M, G, T, P or E");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let suffix = suffix.strip_suffix("iB").or_else(|| suffix.strip_suffix(['B', 'b'])).unwrap_or(suffix);
    let shift = match suffix.chars().as_str() {
        "" => 0,
        one if one.len() == 1 => {
            let unit = one.chars().next().map(|c| c.to_ascii_uppercase());
            UNITS.iter().find(|(name, _)| Some(*name) == unit).map(|(_, shift)| *shift).ok_or_else(wrong)?
        }
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (number.contains('.') && (fraction.is_empty() || shift == 0)) || fraction.len() > 15 {
        return Err(wrong());
    }
    let large = || format!("'{text}' is larger than any disk");
    let whole: u64 = whole.parse().map_err(|_| large())?;
    let part = if fraction.is_empty() {
        0
    } else {
        let numerator: u128 = fraction.parse().map_err(|_| wrong())?;
        ((numerator << shift) / 10u128.pow(fraction.len() as u32)) as u64
    };
    whole.checked_mul(1 << shift).and_then(|bytes| bytes.checked_add(part)).ok_or_else(large)
}

/// A size for people: `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    match UNITS.iter().rev().find(|(_, shift)| bytes >> shift > 0) {
        None => format!("{bytes} B"),
        Some((unit, shift)) => {
            let value = bytes as f64 / (1u64 << shift) as f64;
            let text = format!("{value:.2}");
            format!("{} {unit}iB", text.trim_end_matches('0').trim_end_matches('.'))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_suffix() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("1M", 1 << 20),
            ("1.5G", 3 << 29),
            ("64KiB", 65536),
            ("8b", 8),
            ("2TB", 2 << 40),
            ("7E", 7 << 60),
            ("0.5k", 512),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1X", "-1", "1.G", "1.5", ".5G", "1..5G", "1 G", "16E", "99999999999999999999", "1GG", "0x10"] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("'{text}'")), "{error}");
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human(3 << 29), "1.5 GiB");
        assert_eq!(human(u64::MAX), "16 EiB");
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! include/fvd.h, made by cbindgen from rust/fvd-capi.

use crate::{Findings, top};

fn generate() -> Result<String, String> {
    let dir = top().join("rust/fvd-capi");
    let config = cbindgen::Config::from_file(dir.join("cbindgen.toml"))?;
    let bindings = cbindgen::Builder::new().with_crate(&dir).with_config(config).generate().map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    bindings.write(&mut bytes);
    let text = String::from_utf8(bytes).map_err(|error| error.to_string())?;
    // cbindgen takes "name *" for a name; and C89 compilers know no line comments.
    let text = text.replace("_fn * ", "_fn *").replace(" // __cplusplus", " /* __cplusplus */").replace("  // extern \"C\"", " /* extern \"C\" */");
    if text.matches("fvd_").count() < 50 {
        return Err("cbindgen found next to nothing".to_owned());
    }
    Ok(text)
}

/// Writes the header.
pub fn write() -> Result<Findings, String> {
    let text = generate()?;
    std::fs::write(top().join("include/fvd.h"), text).map_err(|error| format!("include/fvd.h: {error}"))?;
    Ok(Vec::new())
}

/// Compares the header in the tree with what would be written.
pub fn check() -> Result<Findings, String> {
    let there = std::fs::read_to_string(top().join("include/fvd.h")).map_err(|error| format!("include/fvd.h: {error}"))?;
    let made = generate()?;
    let differs = there.lines().zip(made.lines()).position(|(a, b)| a != b);
    let line = differs.unwrap_or_else(|| there.lines().count().min(made.lines().count())) + 1;
    Ok(if there == made { Vec::new() } else { vec![format!("include/fvd.h:{line}: differs from the Rust source; run: cargo run -p xtask -- header")] })
}

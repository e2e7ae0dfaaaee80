// SPDX-License-Identifier: MIT OR Apache-2.0
//! Gives the cdylib its SONAME. The installed library, with symbol versions, is linked by meson
//! from the staticlib: a second version script breaks or is ignored here, depending on the linker.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libfvd.so.0");
    // The tests compile C for the same machine.
    println!("cargo::rustc-env=FVD_TARGET={}", std::env::var("TARGET").expect("cargo says what it builds for"));
}

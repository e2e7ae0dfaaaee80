fn main() {
    let config = cbindgen::Config::from_file("rust/fvd-capi/cbindgen.toml").unwrap();
    let bindings = cbindgen::Builder::new().with_crate("rust/fvd-capi").with_config(config).generate().unwrap();
    bindings.write(std::io::stdout());
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! A panic inside the engine poisons the image; the program that hosts it lives on.

mod common;

use common::*;
use fvd_engine::faults::Fault;
use fvd_engine::host::Limits;
use fvd_engine::{Config, CreateParams, Kind, Request};

#[test]
fn a_panic_poisons_and_every_request_still_completes() {
    let base = base_image(256);
    let world = World::new(Store::default(), Some(base.clone()), 1, Limits::default());
    let creating = world.queue(Config::default());
    let params = CreateParams {
        virtual_size: Some(256 * SECTOR as u64),
        journal_size: 1 << 20,
        base_name: "base".into(),
        base_format: "raw".into(),
        ..CreateParams::default()
    };
    world.request(&creating, Request::Create(Box::new(params))).unwrap().unwrap();
    let before = world.counts.borrow().writes;

    let queue = world.queue(Config { fault: Some(Fault::PanicInWrite), ..Config::default() });
    world.request(&queue, Request::Open).unwrap().unwrap();
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    // Two that overlap: the second waits for the first one's range.
    queue.submit(Request::Write { offset: 0, buf: Buf::new(vec![1; 4096]), fua: false }, 1);
    queue.submit(Request::Write { offset: 512, buf: Buf::new(vec![2; 4096]), fua: false }, 2);
    assert!(world.drain(&queue));
    std::panic::set_hook(quiet);
    let results = std::mem::take(&mut *world.results.borrow_mut());
    assert_eq!(results.len(), 2, "each request completes once");
    assert!(results.iter().all(|r| r.1.as_ref().is_err_and(|e| e.kind == Kind::Poisoned)), "{results:?}");

    assert!(queue.image().is_poisoned());
    let buf = Buf::new(vec![0; 8192]);
    world.request(&queue, Request::Read { offset: 0, buf: buf.clone() }).unwrap().expect("reads still work");
    assert_eq!(*buf.0.borrow(), base[..8192], "the bits were not set");
    let writes = world.counts.borrow().writes;
    for request in [Request::Flush, Request::WriteZeroes { offset: 0, len: 4096, may_unmap: false, fua: false }] {
        assert_eq!(world.request(&queue, request).unwrap().unwrap_err().kind, Kind::Poisoned);
    }
    assert_eq!(world.request(&queue, Request::Close).unwrap().unwrap_err().kind, Kind::Poisoned);
    assert_eq!(world.counts.borrow().writes, writes, "nothing is written once poisoned");
    assert!(writes > before && queue.is_idle());
}

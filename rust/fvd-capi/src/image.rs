// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd_image_*`: the image that queues share.

use crate::error::{Failure, Result, answer, report};
use crate::handle::{Out, Sized_, Tag, check_flags, copy_in, free, get, make};
use crate::panic::{guard, guard_image};
use crate::types::*;
use fvd_engine::host::Limits;
use fvd_engine::{Config, Image, Info};
use fvd_format::header::{BASE_LENGTH_UNKNOWN, VERSION, compatible};
use fvd_format::{Header, RegionKind};
use std::ffi::{c_char, c_int};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An image: may be used from any thread.
pub struct fvd_image {
    _opaque: [u8; 0],
}

pub(crate) struct ImageInner {
    pub image: Arc<Image>,
    /// None for the file host.
    pub ops: Option<fvd_host_ops>,
    /// Queues that were not freed yet.
    pub queues: Arc<AtomicUsize>,
}

impl Tag for ImageInner {
    type Opaque = fvd_image;
    const NAME: &'static str = "image";
    const MAGIC: u64 = 0x6661_7664_496d_6731;
}

/// C callers may share an image between threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Image>();
};

// SAFETY (all of these): plain numbers, pointers and nullable functions, `struct_size: usize` first.
// SAFETY: see above.
unsafe impl Sized_ for fvd_host_ops {
    const NAME: &'static str = "fvd_host_ops";
    const SIZE_MIN: usize = offset_of!(fvd_host_ops, now_ns);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_config {
    const NAME: &'static str = "fvd_config";
    const SIZE_MIN: usize = offset_of!(fvd_config, limits);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_create {
    const NAME: &'static str = "fvd_create";
    const SIZE_MIN: usize = offset_of!(fvd_create, block_size);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_amend {
    const NAME: &'static str = "fvd_amend";
    const SIZE_MIN: usize = offset_of!(fvd_amend, storage_grow_unit);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_block_status {
    const NAME: &'static str = "fvd_block_status";
    const SIZE_MIN: usize = offset_of!(fvd_block_status, offset);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_check {
    const NAME: &'static str = "fvd_check";
    const SIZE_MIN: usize = offset_of!(fvd_check, leaked);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_info {
    const NAME: &'static str = "fvd_info";
    const SIZE_MIN: usize = offset_of!(fvd_info, version);
}
// SAFETY: see above.
unsafe impl Sized_ for fvd_file_options {
    const NAME: &'static str = "fvd_file_options";
    const SIZE_MIN: usize = offset_of!(fvd_file_options, commit_interval_ms);
}

/// The engine's limits for the caller's.
pub(crate) fn limits_of(limits: &fvd_limits) -> Result<Limits> {
    let bad = |what: &str, value: u32| Err(Failure::invalid(format!("struct fvd_limits: {what} is {value}")));
    let fvd_limits { struct_size, request_alignment, memory_alignment, write_granule, flags, reserved } = *limits;
    let set = (request_alignment | memory_alignment | write_granule | flags) != 0;
    if struct_size as usize != size_of::<fvd_limits>() && (struct_size != 0 || set) {
        return bad("struct_size", struct_size);
    }
    if reserved != 0 {
        return bad("reserved", reserved);
    }
    check_flags(flags, FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING | FVD_LIMIT_CAN_FUA, "struct fvd_limits")?;
    let within = |value: u32, max: u32| value == 0 || (value.is_power_of_two() && value <= max);
    for (what, value, max) in
        [("request_alignment", request_alignment, 4096), ("memory_alignment", memory_alignment, 4096), ("write_granule", write_granule, 64 << 10)]
    {
        if !within(value, max) {
            return bad(what, value);
        }
    }
    Ok(Limits {
        request_alignment: request_alignment.max(1),
        memory_alignment: memory_alignment.max(1),
        write_granule: write_granule.max(4096),
        grows_zeroed: flags & FVD_LIMIT_GROWS_ZEROED != 0,
        cheap_zeroing: flags & FVD_LIMIT_CHEAP_ZEROING != 0,
        can_fua: flags & FVD_LIMIT_CAN_FUA != 0,
    })
}

/// Time and memory options: 0 is the default.
pub(crate) fn set_options(config: &mut Config, commit_interval_ms: u64, metadata_memory: u64) {
    if commit_interval_ms != 0 {
        config.commit_interval_ns = commit_interval_ms.saturating_mul(1_000_000);
    }
    if metadata_memory != 0 {
        config.metadata_memory = metadata_memory;
    }
}

fn config_of(config: &fvd_config) -> Result<Config> {
    check_flags(config.flags, FVD_OPEN_RDONLY | FVD_OPEN_NO_IO | FVD_OPEN_DISCARD_NO_UNREF | FVD_OPEN_WAIT_FOR_SPACE | FVD_OPEN_METADATA, "struct fvd_config")?;
    if config.reserved != 0 {
        return Err(Failure::invalid("struct fvd_config: reserved is not 0"));
    }
    let [image, data, base] = &config.limits;
    let mut engine = Config {
        limits: [limits_of(image)?, limits_of(data)?, limits_of(base)?],
        read_only: config.flags & FVD_OPEN_RDONLY != 0,
        no_io: config.flags & FVD_OPEN_NO_IO != 0,
        metadata_only: config.flags & FVD_OPEN_METADATA != 0,
        discard_no_unref: config.flags & FVD_OPEN_DISCARD_NO_UNREF != 0,
        wait_for_space: config.flags & FVD_OPEN_WAIT_FOR_SPACE != 0,
        ..Config::default()
    };
    set_options(&mut engine, config.commit_interval_ms, config.metadata_memory);
    Ok(engine)
}

/// A handle for an image; its files are what ops reaches. Both structs are
/// copied. The handle serves fvd_submit_create and fvd_submit_open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_image_new(ops: *const fvd_host_ops, config: *const fvd_config, out: *mut *mut fvd_image) -> c_int {
    answer(guard(|| {
        if out.is_null() {
            return Err(Failure::invalid("out is NULL"));
        }
        // SAFETY: not NULL, so writable by contract.
        unsafe { *out = std::ptr::null_mut() };
        // Functions unknown here are optional and would have a fallback: they are left alone.
        // SAFETY: the caller's promise; so for `config`.
        let ops = unsafe { copy_in(ops, true) }?;
        // SAFETY: see above.
        let mut config = config_of(&unsafe { copy_in(config, false) }?)?;
        let required = [
            (ops.read.is_some(), "read"),
            (ops.write.is_some(), "write"),
            (ops.flush.is_some(), "flush"),
            (ops.get_length.is_some(), "get_length"),
            (ops.wake.is_some(), "wake"),
        ];
        if let Some((_, name)) = required.iter().find(|(there, _)| !there) {
            return Err(Failure::invalid(format!("struct fvd_host_ops: {name} is required")));
        }
        for limits in &mut config.limits {
            // Not without the functions it takes.
            limits.cheap_zeroing &= ops.write_zeroes.is_some();
            limits.grows_zeroed &= ops.truncate.is_some();
        }
        let inner = ImageInner { image: Image::new(config), ops: Some(ops), queues: Arc::default() };
        // SAFETY: not NULL, so writable by contract.
        unsafe { *out = make(inner) };
        Ok(0)
    }))
}

/// Frees an image and sets *image to NULL. All its queues were freed before:
/// otherwise nothing happens, and fvd_error() says so. NULL is fine. An image
/// that was not closed is left as after a power failure: the next open
/// recovers it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_image_free(image: *mut *mut fvd_image) {
    let result = guard(|| {
        // SAFETY: the caller's promise: NULL or a pointer to a handle or NULL.
        let Some(slot) = (unsafe { image.as_mut() }).filter(|slot| !slot.is_null()) else { return Ok(()) };
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<ImageInner>(*slot) }?;
        let queues = inner.queues.load(Ordering::Acquire);
        if queues > 0 {
            return Err(Failure::new(libc::EBUSY, format!("the image still has {queues} queues")));
        }
        // SAFETY: the caller's promise; nobody uses an image that has no queues and is freed.
        drop(unsafe { free::<ImageInner>(*slot) }?);
        *slot = std::ptr::null_mut();
        Ok(())
    });
    if let Err(failure) = result {
        report(&failure);
    }
}

fn put_string(to: &mut [c_char], text: &str) {
    // The last byte stays NUL.
    let room = to.len() - 1;
    for (to, &from) in to[..room].iter_mut().zip(text.as_bytes()) {
        *to = from as c_char;
    }
}

fn info_of(info: &Info, poisoned: bool) -> fvd_info {
    let header: &Header = &info.header;
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let has_base_length = !header.base_name.is_empty() && header.base_length != BASE_LENGTH_UNKNOWN;
    let mut out = fvd_info {
        struct_size: 0,
        uuid: header.uuid,
        version: VERSION,
        block_size: header.block_size,
        chunk_size: header.chunk_size,
        flags: flag(info.was_clean, FVD_INFO_CLEAN)
            | flag(has_base_length, FVD_INFO_HAS_BASE_LENGTH)
            | flag(header.compatible & compatible::NON_ZEROING != 0, FVD_INFO_NON_ZEROING)
            | flag(poisoned, FVD_INFO_POISONED),
        virtual_size: header.virtual_size,
        generation: header.generation,
        epoch: header.epoch,
        base_length: if has_base_length { header.base_length } else { 0 },
        covered: header.covered,
        data_offset: header.data_offset,
        journal_size: header.region(RegionKind::Journal).map_or(0, |region| region.length),
        metadata_bytes: header.regions.iter().flatten().map(|region| region.length).sum(),
        blocks: header.blocks(),
        commits_replayed: info.commits_replayed,
        incompatible: header.incompatible,
        compatible: header.compatible,
        autoclear: header.autoclear,
        stat_commits: info.stats.commits,
        stat_journal_bytes: info.stats.journal_bytes,
        stat_checkpoints: info.stats.checkpoints,
        stat_pages_written: info.stats.pages_written,
        stat_header_updates: info.stats.header_updates,
        stat_write_waits: info.stats.write_waits,
        stat_flush_waits: info.stats.flush_waits,
        stat_base_bytes: info.stats.base_bytes,
        base_name: [0; 1024],
        base_format: [0; 32],
        storage_grow_unit: header.storage_grow_unit,
        reach: header.reach,
        chunks: if header.is_compact() { header.chunks() } else { 0 },
        data_name: [0; 1024],
        data_format: [0; 32],
    };
    put_string(&mut out.base_name, &header.base_name);
    put_string(&mut out.base_format, &header.base_format);
    put_string(&mut out.data_name, &header.data_name);
    put_string(&mut out.data_format, &header.data_format);
    out
}

/// A picture of the image: after fvd_submit_open succeeded, from any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_image_info(image: *mut fvd_image, out: *mut fvd_info) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<ImageInner>(image) }?;
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(out) }?;
        let info = inner.image.info()?;
        out.write(&info_of(&info, inner.image.is_poisoned()));
        Ok(0)
    }))
}

/// The answer to low_space. result 0: the storage got longer; writes that
/// wait for storage look again, and low_space is called again if there is not
/// enough. A negative errno: it could not; those that wait fail with -ENOSPC.
/// From any thread, also from low_space.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_image_space_changed(image: *mut fvd_image, result: c_int) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<ImageInner>(image) }?;
        guard_image(&inner.image, || inner.image.space_changed(result >= 0)).map_err(|text| Failure::new(libc::EIO, text))?;
        Ok(0)
    }))
}

/// Whether writes that find no storage wait: at first as
/// FVD_OPEN_WAIT_FOR_SPACE says. With wait 0 those that wait now fail with
/// -ENOSPC, too. From any thread, also from low_space.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_image_wait_for_space(image: *mut fvd_image, wait: c_int) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<ImageInner>(image) }?;
        guard_image(&inner.image, || inner.image.set_wait_for_space(wait != 0)).map_err(|text| Failure::new(libc::EIO, text))?;
        Ok(0)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked() {
        let good = fvd_limits {
            struct_size: size_of::<fvd_limits>() as u32,
            request_alignment: 512,
            memory_alignment: 4096,
            write_granule: 0,
            flags: FVD_LIMIT_CAN_FUA,
            reserved: 0,
        };
        let limits = limits_of(&good).unwrap();
        assert_eq!((limits.request_alignment, limits.memory_alignment, limits.write_granule), (512, 4096, 4096));
        assert!(limits.can_fua && !limits.cheap_zeroing && !limits.grows_zeroed);
        let zero = fvd_limits { struct_size: 0, request_alignment: 0, memory_alignment: 0, flags: 0, ..good };
        assert_eq!(limits_of(&zero).unwrap().request_alignment, 1);
        for bad in [
            fvd_limits { struct_size: 0, ..good },
            fvd_limits { struct_size: 20, ..good },
            fvd_limits { request_alignment: 3, ..good },
            fvd_limits { request_alignment: 8192, ..good },
            fvd_limits { memory_alignment: 8192, ..good },
            fvd_limits { write_granule: 128 << 10, ..good },
            fvd_limits { flags: 8, ..good },
            fvd_limits { reserved: 1, ..good },
        ] {
            assert_eq!(limits_of(&bad).unwrap_err().errno, libc::EINVAL, "{bad:?}");
        }
    }
}

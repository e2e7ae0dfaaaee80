// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options of creation, asked for of an image that exists.

use crate::create::check_grow_unit;
use crate::error::{Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::Host;
use crate::image::faulty;
use crate::request::AmendParams;
use fvd_format::{Header, RegionKind};
use std::rc::Rc;

impl<H: Host> Queue<H> {
    /// Gives the image the options in `params`. All are looked at before any changes; what changes does so
    /// in one header update, so that a cut leaves all or nothing (CC-37).
    pub(crate) async fn amend(self: &Rc<Self>, params: &AmendParams) -> Result<()> {
        let image = self.image().clone();
        image.check_writable()?;
        image.check_poison()?;
        // Regions, and with them sizes, are not built anew meanwhile.
        let _one_at_a_time = image.layout_lock.lock().await;
        let header = image.header();
        refuse_fixed(params, &header)?;
        let Some(unit) = params.storage_grow_unit else { return Ok(()) };
        if !header.is_compact() {
            return fail(Kind::Unsupported, "storage_grow_unit is of compact images; this one is not compact, and cannot become so");
        }
        if unit == header.storage_grow_unit {
            return Ok(());
        }
        check_grow_unit(unit, header.chunk_size)?;
        if faulty!(image, AmendNotWritten) {
            image.meta().header.as_mut().expect("open image").storage_grow_unit = unit;
            return Ok(());
        }
        // A growth step under way has the old length; the next one has the new one.
        self.update_header(|header| header.storage_grow_unit = unit).await
    }
}

/// Refuses to change what is laid down at creation. The value that the image has is no change.
fn refuse_fixed(params: &AmendParams, header: &Header) -> Result<()> {
    let journal = header.region(RegionKind::Journal).map_or(0, |region| region.length);
    let fixed = [
        ("compact_image", params.compact.map(u64::from), u64::from(header.is_compact())),
        ("chunk_size", params.chunk_size, header.chunk_size.into()),
        ("block_size", params.block_size, header.block_size.into()),
        ("journal_size", params.journal_size, journal),
    ];
    for (name, wanted, present) in fixed {
        if let Some(wanted) = wanted
            && wanted != present
        {
            let text = format!("{name} cannot change after creation: it is {present}, {wanted} was asked for; convert the image");
            return fail(Kind::Unsupported, text);
        }
    }
    Ok(())
}

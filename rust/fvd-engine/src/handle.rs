// SPDX-License-Identifier: MIT OR Apache-2.0
//! From request to handler: the one future of every task.

use crate::error::{Kind, Result};
use crate::executor::{Job, Queue, fail};
use crate::host::Host;
use crate::request::{Repair, Reply, Request};
use std::rc::Rc;

/// Runs a task to its end. Background work has nobody to tell but the log.
pub(crate) async fn run<H: Host>(queue: &Rc<Queue<H>>, job: Job<H::Buf>) -> Result<Reply> {
    match job {
        Job::Guest(request) => serve(queue, request).await,
        Job::Commit => {
            queue.background_commit().await;
            Ok(Reply::Done)
        }
        Job::Punch => {
            queue.punch().await;
            Ok(Reply::Done)
        }
        Job::Step => {
            queue.step_ahead().await;
            Ok(Reply::Done)
        }
        Job::Checkpoint => {
            queue.background_checkpoint().await;
            Ok(Reply::Done)
        }
    }
}

async fn serve<H: Host>(queue: &Rc<Queue<H>>, request: Request<H::Buf>) -> Result<Reply> {
    let done = |()| Reply::Done;
    match request {
        Request::Create(params) => return queue.create(&params).await.map(done),
        Request::Open => return queue.open().await.map(done),
        Request::Close => return queue.close().await.map(done),
        _ => queue.image().check_open()?,
    }
    let needs_metadata = matches!(request, Request::BlockStatus { .. } | Request::Check { repair: Repair::None });
    if queue.image().config.metadata_only && !needs_metadata {
        return fail(Kind::State, "the image is open for its metadata only");
    }
    match request {
        Request::Read { offset, buf } => queue.read(offset, buf).await.map(done),
        Request::Write { offset, buf, fua } => queue.write(offset, buf, fua).await.map(done),
        Request::Flush => queue.flush().await.map(done),
        Request::WriteZeroes { offset, len, may_unmap, fua } => queue.write_zeroes(offset, len, may_unmap, fua).await.map(done),
        Request::Discard { offset, len } => queue.discard(offset, len).await.map(done),
        Request::Resize { size, zeroed } => queue.resize(size, zeroed).await.map(done),
        Request::BlockStatus { offset, len } => queue.block_status(offset, len).await.map(Reply::Status),
        Request::ChangeBase { name, format } => queue.change_base(name, format).await.map(done),
        Request::Amend(params) => queue.amend(&params).await.map(done),
        Request::MakeEmpty => queue.make_empty().await.map(done),
        Request::Check { repair } => queue.check(repair).await.map(|report| Reply::Check(Box::new(report))),
        Request::Create(_) | Request::Open | Request::Close => unreachable!("served above"),
    }
}

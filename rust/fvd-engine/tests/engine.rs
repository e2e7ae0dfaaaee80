// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scenarios on the simulated world, each named for what it promises.

mod common;

#[path = "engine/bytes.rs"]
mod bytes;
#[path = "engine/journal.rs"]
mod journal;
#[path = "engine/life.rs"]
mod life;
#[path = "engine/repair.rs"]
mod repair;
#[path = "engine/space.rs"]
mod space;
#[path = "engine/threads.rs"]
mod threads;

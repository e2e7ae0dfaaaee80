// SPDX-License-Identifier: MIT OR Apache-2.0
//! A deterministic simulator that hosts the unchanged engine: one seed decides the image, the
//! requests, the order in which operations end, what fails and when the power goes; an oracle knows
//! what every cell of the guest's disk may hold (C4), and a failure replays step for step. See
//! `docs/simulator.md`.
#![forbid(unsafe_code)]

mod branches;
pub mod campaign;
pub mod checker;
pub mod clock;
pub mod content;
pub mod damage;
pub mod disk;
pub mod exhaustive;
pub mod fault_loop;
pub mod geometry;
pub mod guest;
pub mod memory;
pub mod options;
pub mod oracle;
pub mod plan;
pub mod prng;
pub mod run;
pub mod seeds;
pub mod shrink;
pub mod store;
pub mod workload;
pub mod world;

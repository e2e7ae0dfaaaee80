// SPDX-License-Identifier: MIT OR Apache-2.0
//! A few threads for system calls that block, started when there is work for them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Most threads of one pool: enough to keep a disk busy, few enough to cost nothing.
const THREADS_MAX: usize = 8;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Jobs run outside the lock: it guards plain data that no panic leaves half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.lock();
            } else if state.stop {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// The pool. Dropping it waits for all jobs.
#[derive(Default)]
pub(crate) struct Pool(Arc<Shared>);

impl Pool {
    /// Runs `job` on a thread of the pool, or right here when no thread can be had.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.lock();
        state.jobs.push_back(Box::new(job));
        if state.idle < state.jobs.len() && state.threads.len() < THREADS_MAX {
            let shared = Arc::clone(&self.0);
            match std::thread::Builder::new().name("fvd-io".into()).spawn(move || shared.serve()) {
                Ok(thread) => state.threads.push(thread),
                Err(_) if state.threads.is_empty() => {
                    let jobs: Vec<Job> = state.jobs.drain(..).collect();
                    drop(state);
                    jobs.into_iter().for_each(|job| job());
                    return;
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.0.work.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.0.lock();
            state.stop = true;
            std::mem::take(&mut state.threads)
        };
        self.0.work.notify_all();
        for thread in threads {
            // A job that panicked has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

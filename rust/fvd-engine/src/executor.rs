// SPDX-License-Identifier: MIT OR Apache-2.0
//! Queues: a small executor per host thread.
//!
//! Requests are futures in pooled slots, polled only on their queue's thread. A completion that
//! arrives while a task is being polled is noted and handled by the running loop (a trampoline), so
//! the host may complete inline without recursion. No borrow is held while the host is called.

use crate::brackets::BracketToken;
use crate::error::{Error, Result};
use crate::handle;
use crate::host::{Host, HostOp, Token, Wake};
use crate::image::Image;
use crate::request::{Reply, Request};
use crate::sync::{Mutex, lock};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// What a task does.
pub(crate) enum Job<B> {
    /// A guest's (or manager's) request.
    Guest(Request<B>),
    /// Commits what is pending.
    Commit,
    /// Writes metadata pages in place and frees journal space.
    Checkpoint,
    /// Gives the storage of freed chunks back to the host.
    Punch,
    /// Opens a growth step ahead of need.
    Step,
}

#[derive(Default)]
struct InboxState {
    woken: VecDeque<u32>,
    /// The queue's loop is running and will look here again before it stops.
    running: bool,
}

/// Tasks woken, from any thread.
struct Inbox {
    state: Mutex<InboxState>,
    wake: Box<dyn Wake>,
}

struct TaskWaker {
    inbox: Arc<Inbox>,
    task: u32,
}

impl std::task::Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let running = {
            let mut state = lock(&self.inbox.state);
            state.woken.push_back(self.task);
            state.running
        };
        if !running {
            self.inbox.wake.wake();
        }
    }
}

/// A pool of tasks; the trait hides the type of the future.
trait Pool<H: Host> {
    fn start(&self, queue: Rc<Queue<H>>, job: Job<H::Buf>, done: Option<H::Done>) -> u32;
    /// Polls a live task; stale ids are ignored.
    fn poll(&self, task: u32) -> Polled<H::Done>;
    fn live(&self) -> usize;
    /// Drops every task, wherever it is.
    fn clear(&self);
}

/// What came of polling a task.
enum Polled<D> {
    /// It waits, or there is no such task.
    Pending,
    /// It is done; background work has nobody to tell.
    Done(Option<D>, Result<Reply>),
    /// It panicked and is gone.
    Panicked(Option<D>, String),
}

struct TaskSlot<F, D> {
    future: RefCell<Pin<Box<Option<F>>>>,
    /// Kept outside the future, so that a request is completed even if its future panics.
    done: RefCell<Option<D>>,
    waker: Waker,
}

struct Slots<F, S, D> {
    spawn: S,
    inbox: Arc<Inbox>,
    slots: RefCell<Vec<Rc<TaskSlot<F, D>>>>,
    free: RefCell<Vec<u32>>,
    live: Cell<usize>,
}

impl<H: Host, F: Future<Output = Result<Reply>>, S: Fn(Rc<Queue<H>>, Job<H::Buf>) -> F> Pool<H> for Slots<F, S, H::Done> {
    fn start(&self, queue: Rc<Queue<H>>, job: Job<H::Buf>, done: Option<H::Done>) -> u32 {
        let reused = self.free.borrow_mut().pop();
        let task = reused.unwrap_or_else(|| {
            let mut slots = self.slots.borrow_mut();
            let task = slots.len() as u32;
            let waker = Waker::from(Arc::new(TaskWaker { inbox: self.inbox.clone(), task }));
            slots.push(Rc::new(TaskSlot { future: RefCell::new(Box::pin(None)), done: RefCell::new(None), waker }));
            task
        });
        let slot = self.slots.borrow()[task as usize].clone();
        *slot.done.borrow_mut() = done;
        slot.future.borrow_mut().as_mut().set(Some((self.spawn)(queue, job)));
        self.live.set(self.live.get() + 1);
        task
    }

    fn poll(&self, task: u32) -> Polled<H::Done> {
        let Some(slot) = self.slots.borrow().get(task as usize).cloned() else { return Polled::Pending };
        let mut future = slot.future.borrow_mut();
        let Some(pinned) = future.as_mut().as_pin_mut() else { return Polled::Pending };
        let polled = catch_unwind(AssertUnwindSafe(|| pinned.poll(&mut Context::from_waker(&slot.waker))));
        let outcome = match polled {
            Ok(Poll::Pending) => return Polled::Pending,
            Ok(Poll::Ready(result)) => Ok(result),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
                Err(text.unwrap_or_default())
            }
        };
        future.as_mut().set(None);
        drop(future);
        self.live.set(self.live.get() - 1);
        self.free.borrow_mut().push(task);
        let done = slot.done.take();
        match outcome {
            Ok(result) => Polled::Done(done, result),
            Err(text) => Polled::Panicked(done, text),
        }
    }

    fn live(&self) -> usize {
        self.live.get()
    }

    fn clear(&self) {
        for slot in self.slots.take() {
            slot.future.borrow_mut().as_mut().set(None);
            slot.done.take();
        }
        self.free.borrow_mut().clear();
        self.live.set(0);
    }
}

enum OpState<H: Host> {
    Free,
    /// A task waits, or will.
    Waiting(u32),
    Ready(i64, HostOp<H::Buf>),
    /// The task is gone; the host still owns the buffers.
    Orphan,
    /// Pass-through request: no task.
    Direct(H::Done, BracketToken),
}

struct OpSlot<H: Host> {
    generation: u32,
    state: OpState<H>,
}

struct Ops<H: Host> {
    slots: Vec<OpSlot<H>>,
    free: Vec<u32>,
}

/// One host thread's access to an image. Not `Send`: it lives and is called on its thread only.
pub struct Queue<H: Host> {
    image: Arc<Image>,
    host: H,
    inbox: Arc<Inbox>,
    pool: Box<dyn Pool<H>>,
    ops: RefCell<Ops<H>>,
    ready: RefCell<VecDeque<u32>>,
    running: Cell<bool>,
    current: Cell<u32>,
    finished: RefCell<VecDeque<(H::Done, Result<Reply>)>>,
    finishing: Cell<bool>,
    bracket_slot: usize,
    /// Requests whose task panicked, and the operations that still use their memory.
    zombies: RefCell<Vec<(H::Done, Vec<Token>, Error)>>,
    me: Weak<Self>,
}

impl<H: Host> Queue<H> {
    /// A queue of `image` on the calling thread.
    pub fn new(image: Arc<Image>, host: H, wake: Box<dyn Wake>) -> Rc<Self> {
        let inbox = Arc::new(Inbox { state: Mutex::default(), wake });
        let spawn = |queue: Rc<Queue<H>>, job: Job<H::Buf>| async move { handle::run(&queue, job).await };
        let pool = Slots {
            spawn,
            inbox: inbox.clone(),
            slots: RefCell::default(),
            free: RefCell::default(),
            live: Cell::new(0),
        };
        let slot = image.next_slot();
        Rc::new_cyclic(|me| Self {
            image,
            host,
            inbox,
            pool: Box::new(pool),
            ops: RefCell::new(Ops { slots: Vec::new(), free: Vec::new() }),
            ready: RefCell::default(),
            running: Cell::new(false),
            current: Cell::new(u32::MAX),
            finished: RefCell::default(),
            finishing: Cell::new(false),
            // Only spreads contention: two queues may share a slot.
            bracket_slot: slot,
            zombies: RefCell::default(),
            me: me.clone(),
        })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    pub(crate) fn bracket_slot(&self) -> usize {
        self.bracket_slot
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// Whether no request and no operation is under way, so that the queue may be dropped.
    pub fn is_idle(&self) -> bool {
        let ops = self.ops.borrow();
        self.pool.live() == 0 && ops.free.len() == ops.slots.len() && self.finished.borrow().is_empty() && self.zombies.borrow().is_empty()
    }

    /// Drops all work under way, as when a process is killed: nothing is completed, the host is not
    /// called. Tasks refer to their queue, so that one with work would never be dropped. The handle
    /// is useless afterwards.
    pub fn abandon(&self) {
        self.pool.clear();
        *self.ops.borrow_mut() = Ops { slots: Vec::new(), free: Vec::new() };
        self.ready.borrow_mut().clear();
        self.finished.borrow_mut().clear();
        self.zombies.borrow_mut().clear();
    }

    /// Starts a request. Every failure arrives at [`Host::done`], which may run before this returns.
    pub fn submit(self: &Rc<Self>, request: Request<H::Buf>, done: H::Done) {
        let request = match request {
            Request::Read { offset, buf } => match self.direct(offset, buf, false) {
                Ok(op) => return self.submit_direct(op, done),
                Err(buf) => Request::Read { offset, buf },
            },
            Request::Write { offset, buf, fua: false } => match self.direct(offset, buf, true) {
                Ok(op) => return self.submit_direct(op, done),
                Err(buf) => Request::Write { offset, buf, fua: false },
            },
            request => request,
        };
        self.start(Job::Guest(request), Some(done));
    }

    /// Starts background work on this queue.
    pub(crate) fn spawn(&self, job: Job<H::Buf>) {
        self.start(job, None);
    }

    fn start(&self, job: Job<H::Buf>, done: Option<H::Done>) {
        self.image.task_started();
        let me = self.me.upgrade().expect("a queue is called through its Rc");
        let task = self.pool.start(me, job, done);
        self.ready.borrow_mut().push_back(task);
        self.run_ready();
    }

    /// Handles what other threads woke; called after [`Wake::wake`].
    pub fn run(self: &Rc<Self>) {
        self.run_ready();
    }

    /// The timer fired.
    pub fn timer(self: &Rc<Self>) {
        if self.image.timer_fired() {
            self.spawn(Job::Commit);
        }
    }

    /// An operation is complete: `ret` is its result, a negative errno on failure, and `op` comes
    /// back with its memory. False, and nothing happens, if `token` names no operation under way.
    pub fn complete(self: &Rc<Self>, token: Token, ret: i64, op: HostOp<H::Buf>) -> bool {
        let (index, generation) = (token as u32, (token >> 32) as u32);
        let direct = {
            let mut ops = self.ops.borrow_mut();
            let Some(slot) = ops.slots.get_mut(index as usize).filter(|s| s.generation == generation) else { return false };
            match std::mem::replace(&mut slot.state, OpState::Free) {
                OpState::Free => return false,
                OpState::Ready(first, own) => {
                    // A second completion of one operation must not replace the first.
                    slot.state = OpState::Ready(first, own);
                    return false;
                }
                OpState::Waiting(task) => {
                    slot.state = OpState::Ready(ret, op);
                    self.ready.borrow_mut().push_back(task);
                    None
                }
                OpState::Orphan => {
                    ops.release(index);
                    drop(ops);
                    self.bury(token);
                    return true;
                }
                OpState::Direct(done, bracket) => {
                    ops.release(index);
                    Some((done, bracket, op))
                }
            }
        };
        match direct {
            Some((done, bracket, op)) => {
                self.image.end(bracket);
                let result = crate::io::result_of(&op, ret).map(|_| Reply::Done);
                self.finish(done, result);
            }
            None => self.run_ready(),
        }
        true
    }

    fn submit_direct(&self, direct: (HostOp<H::Buf>, BracketToken), done: H::Done) {
        let (op, bracket) = direct;
        let token = self.ops.borrow_mut().take(OpState::Direct(done, bracket));
        self.host.submit(token, op);
    }

    /// Starts a host operation for the task being polled.
    pub(crate) fn io(self: &Rc<Self>, op: HostOp<H::Buf>) -> Io<H> {
        let task = self.current.get();
        assert_ne!(task, u32::MAX, "operations belong to tasks");
        let token = self.ops.borrow_mut().take(OpState::Waiting(task));
        self.host.submit(token, op);
        Io { queue: self.clone(), index: token as u32, taken: false }
    }

    /// Reports a finished request; nested completions wait for the outer one.
    pub(crate) fn finish(&self, done: H::Done, result: Result<Reply>) {
        self.finished.borrow_mut().push_back((done, result));
        if self.finishing.replace(true) {
            return;
        }
        loop {
            let next = self.finished.borrow_mut().pop_front();
            let Some((done, result)) = next else { break };
            self.host.done(done, result);
        }
        self.finishing.set(false);
    }

    fn run_ready(&self) {
        if self.running.replace(true) {
            return;
        }
        lock(&self.inbox.state).running = true;
        loop {
            let next = self.ready.borrow_mut().pop_front();
            if let Some(task) = next {
                self.current.set(task);
                let polled = self.poll_task(task);
                self.current.set(u32::MAX);
                if let Some((done, result)) = polled {
                    self.finish(done, result);
                }
                continue;
            }
            let mut state = lock(&self.inbox.state);
            if state.woken.is_empty() {
                state.running = false;
                break;
            }
            self.ready.borrow_mut().extend(state.woken.drain(..));
        }
        self.running.set(false);
    }
}

impl<H: Host> Queue<H> {
    /// Polls a task; returns the request to finish, if it is done.
    fn poll_task(&self, task: u32) -> Option<(H::Done, Result<Reply>)> {
        match self.pool.poll(task) {
            Polled::Pending => None,
            Polled::Done(done, result) => {
                self.image.task_ended();
                Some((done?, result))
            }
            Polled::Panicked(done, text) => {
                self.image.poison(&format!("internal error: {text}"));
                self.image.task_ended();
                let error = Error::poisoned().context(&format!("internal error: {text}"));
                // The host may still be writing to the request's memory.
                let ops = self.ops.borrow();
                let orphans = ops.slots.iter().enumerate().filter(|(_, s)| matches!(s.state, OpState::Orphan));
                let left: Vec<Token> = orphans.map(|(i, s)| u64::from(s.generation) << 32 | i as u64).collect();
                drop(ops);
                let done = done?;
                if left.is_empty() {
                    return Some((done, Err(error)));
                }
                self.zombies.borrow_mut().push((done, left, error));
                None
            }
        }
    }

    /// An orphaned operation came back: requests that waited only for it are finished.
    fn bury(&self, token: Token) {
        let mut ready = Vec::new();
        let mut zombies = self.zombies.borrow_mut();
        for zombie in zombies.iter_mut() {
            zombie.1.retain(|t| *t != token);
        }
        while let Some(at) = zombies.iter().position(|z| z.1.is_empty()) {
            let (done, _, error) = zombies.swap_remove(at);
            ready.push((done, error));
        }
        drop(zombies);
        for (done, error) in ready {
            self.finish(done, Err(error));
        }
    }
}

impl<H: Host> Ops<H> {
    fn take(&mut self, state: OpState<H>) -> Token {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(OpSlot { generation: 1, state: OpState::Free });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.state = state;
        u64::from(slot.generation) << 32 | u64::from(index)
    }

    fn release(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.state = OpState::Free;
        // 0 is never a generation, so that no token is 0.
        slot.generation = slot.generation.wrapping_add(1).max(1);
        self.free.push(index);
    }
}

/// A host operation under way; it was started when this was made.
pub(crate) struct Io<H: Host> {
    queue: Rc<Queue<H>>,
    index: u32,
    taken: bool,
}

impl<H: Host> Future for Io<H> {
    type Output = (i64, HostOp<H::Buf>);

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let result = {
            let mut ops = self.queue.ops.borrow_mut();
            let slot = &mut ops.slots[self.index as usize];
            match std::mem::replace(&mut slot.state, OpState::Free) {
                OpState::Ready(ret, op) => {
                    ops.release(self.index);
                    Some((ret, op))
                }
                other => {
                    slot.state = other;
                    None
                }
            }
        };
        match result {
            Some(result) => {
                self.taken = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl<H: Host> Drop for Io<H> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut ops = self.queue.ops.borrow_mut();
        match ops.slots[self.index as usize].state {
            OpState::Ready(..) => ops.release(self.index),
            _ => ops.slots[self.index as usize].state = OpState::Orphan,
        }
    }
}

impl<H: Host> Drop for Queue<H> {
    fn drop(&mut self) {
        debug_assert!(std::thread::panicking() || self.is_idle(), "queue dropped with work under way");
    }
}

/// Shorthand used by every module: an error with context.
pub(crate) fn fail<T>(kind: crate::Kind, text: impl Into<String>) -> Result<T> {
    Err(Error::new(kind, text))
}

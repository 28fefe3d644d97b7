//! The pending result of a submission, and how a thread waits for it.
//!
//! A ticket is a future whose `poll` never blocks. What wakes it depends on its executor:
//!
//! - [`block_on`] and [`Ticket::wait`] wait for the device themselves, with one blocking call of the driver on the calling
//!   thread, and no other thread.
//! - Under any other executor a thread is started that makes this call and then wakes the task.
//! - In a browser the event loop wakes the task, and nothing may block. Code that waits, as the conformance list does, is
//!   suspended there until the event loop has the result (JSPI), if it was called by a promising export.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Result;
#[cfg(target_arch = "wasm32")]
use crate::error::BackendError;

#[cfg(not(target_arch = "wasm32"))]
pub use self::native::block_on;

/// [`Send`] on native targets, and no requirement in a browser, where handles of WebGPU belong to the thread that created
/// them.
#[cfg(not(target_arch = "wasm32"))]
pub trait MaybeSend: Send {}
#[cfg(not(target_arch = "wasm32"))]
impl<T: Send + ?Sized> MaybeSend for T {}
/// [`Send`] on native targets, and no requirement in a browser, where handles of WebGPU belong to the thread that created
/// them.
#[cfg(target_arch = "wasm32")]
pub trait MaybeSend {}
#[cfg(target_arch = "wasm32")]
impl<T: ?Sized> MaybeSend for T {}

/// The future in a ticket. A trait of its own, because a box may only combine [`Future`] with auto traits.
trait Answer<T>: Future<Output = Result<T>> + MaybeSend {}
impl<T, F: Future<Output = Result<T>> + MaybeSend> Answer<T> for F {}

/// The pending result of a submission. Polling it never blocks, and dropping it does not wait for the device.
pub struct Ticket<T>(Pin<Box<dyn Answer<T>>>);

impl<T: MaybeSend + 'static> Ticket<T> {
    /// A ticket that waits for `future`.
    pub fn new(future: impl Future<Output = Result<T>> + MaybeSend + 'static) -> Self {
        Self(Box::pin(future))
    }

    /// A ticket with a result.
    pub fn ready(answer: Result<T>) -> Self {
        Self::new(std::future::ready(answer))
    }
}

impl<T> Ticket<T> {
    /// Blocks the thread until the result is ready.
    ///
    /// # Errors
    /// Those of the work itself.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn wait(self) -> Result<T> {
        block_on(self)
    }
}

#[cfg(target_arch = "wasm32")]
impl<T: 'static> Ticket<T> {
    /// Suspends the calling WebAssembly until the result is ready, while the event loop goes on. Only functions that an
    /// export with `#[wasm_bindgen(jspi)]` calls can be suspended, and only in browsers with JSPI.
    ///
    /// # Errors
    /// Those of the work itself, and a caller that cannot be suspended.
    #[expect(deprecated, reason = "wasm-bindgen calls its use of JSPI experimental")]
    pub fn wait(mut self) -> Result<T> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        if let Poll::Ready(result) = Pin::new(&mut self).poll(&mut cx) {
            return result;
        }
        let answer = std::rc::Rc::new(std::cell::Cell::new(None));
        let given = std::rc::Rc::clone(&answer);
        let promise = js_sys::futures::future_to_promise(async move {
            given.set(Some(self.await));
            Ok(wasm_bindgen::JsValue::UNDEFINED)
        });
        let waited = js_sys::futures::jspi_block_on_promise(&promise);
        answer.take().unwrap_or_else(|| {
            Err(BackendError::Driver {
                backend: "wgpu",
                what: "to wait for the device".to_owned(),
                reason: format!("{waited:?}"),
            })
        })
    }
}

/// Returns after so many milliseconds, in which the event loop of the browser goes on.
#[cfg(target_arch = "wasm32")]
pub async fn pause(milliseconds: i32) {
    #[wasm_bindgen::prelude::wasm_bindgen]
    extern "C" {
        #[wasm_bindgen(js_name = setTimeout)]
        fn set_timeout(call: &js_sys::Function, milliseconds: i32);
    }
    let over = js_sys::Promise::new(&mut |resolve, _| set_timeout(&resolve, milliseconds));
    // This promise is never rejected.
    drop(js_sys::futures::JsFuture::from(over).await);
}

impl<T> Future for Ticket<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

/// For the `poll` of a future whose device is busy: wakes `cx` when `waiter` has returned, which blocks until the device has
/// finished or is lost. Under [`block_on`] the waiter runs on this thread, otherwise on a thread that is started for it; a
/// browser needs none. A future calls this once for each wait. `backend` is for the message.
///
/// # Errors
/// If no thread can be started.
#[cfg_attr(target_arch = "wasm32", allow(unused_variables))]
pub fn await_device(
    cx: &Context<'_>,
    backend: &'static str,
    waiter: impl FnOnce() + MaybeSend + 'static,
) -> Result<()> {
    #[cfg(not(target_arch = "wasm32"))]
    native::await_device(cx, backend, Box::new(waiter))?;
    Ok(())
}

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::cell::RefCell;
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Wake, Waker};
    use std::thread::{self, Thread};

    use crate::backend::Result;
    use crate::error::BackendError;

    /// Blocks until the device has finished the work of a ticket, or is lost.
    type Waiter = Box<dyn FnOnce() + Send>;

    thread_local! {
        /// The waiters of [`block_on`] on this thread; `None` outside of it.
        static BLOCKING: RefCell<Option<Vec<Waiter>>> = const { RefCell::new(None) };
    }

    pub(super) fn await_device(
        cx: &Context<'_>,
        backend: &'static str,
        waiter: Waiter,
    ) -> Result<()> {
        let other = BLOCKING.with_borrow_mut(|blocking| match blocking {
            Some(waiters) => {
                waiters.push(waiter);
                None
            }
            None => Some(waiter),
        });
        let Some(waiter) = other else {
            return Ok(());
        };
        let waker = cx.waker().clone();
        let started = thread::Builder::new()
            .name("device".to_owned())
            .spawn(move || {
                waiter();
                waker.wake();
            });
        started.map(drop).map_err(|error| BackendError::Driver {
            backend,
            what: "a thread that waits for the device".to_owned(),
            reason: error.to_string(),
        })
    }

    /// Collects waiters, and restores the thread's previous state afterwards: one [`block_on`] may run inside another.
    struct Collecting(Option<Vec<Waiter>>);

    impl Collecting {
        fn start() -> Self {
            Self(BLOCKING.replace(Some(Vec::new())))
        }
    }

    impl Drop for Collecting {
        fn drop(&mut self) {
            BLOCKING.set(self.0.take());
        }
    }

    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    /// Runs a future to completion on this thread. While it awaits a [`Ticket`](super::Ticket), the thread waits for the
    /// device; while it awaits anything else, the thread sleeps until it is woken.
    pub fn block_on<T>(future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut cx = Context::from_waker(&waker);
        loop {
            let collecting = Collecting::start();
            let polled = future.as_mut().poll(&mut cx);
            let waiters = BLOCKING.take().unwrap_or_default();
            drop(collecting);
            if let Poll::Ready(output) = polled {
                return output;
            }
            if waiters.is_empty() {
                thread::park();
            }
            waiters.into_iter().for_each(|waiter| waiter());
        }
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Condvar, Mutex};
    use std::task::Waker;
    use std::thread::{self, ThreadId};

    use super::*;

    /// A device that finishes when it is waited for, and records which thread waited.
    #[derive(Default)]
    struct Device {
        waited: Mutex<Vec<ThreadId>>,
        polls: AtomicUsize,
    }

    /// The future of an answer of that device.
    struct Busy {
        device: Arc<Device>,
        asked: bool,
    }

    impl Future for Busy {
        type Output = Result<u32>;

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            self.device.polls.fetch_add(1, Ordering::Relaxed);
            if !self.device.waited.lock().unwrap().is_empty() {
                return Poll::Ready(Ok(7));
            }
            if !std::mem::replace(&mut self.asked, true) {
                let device = Arc::clone(&self.device);
                let waiter = move || device.waited.lock().unwrap().push(thread::current().id());
                await_device(cx, "test", waiter)?;
            }
            Poll::Pending
        }
    }

    fn ticket() -> (Ticket<u32>, Arc<Device>) {
        let device = Arc::<Device>::default();
        let busy = Busy {
            device: Arc::clone(&device),
            asked: false,
        };
        (Ticket::new(busy), device)
    }

    #[test]
    fn a_wait_blocks_the_thread_of_its_caller() {
        let (ticket, device) = ticket();
        assert_eq!(ticket.wait(), Ok(7));
        assert_eq!(*device.waited.lock().unwrap(), [thread::current().id()]);
        assert_eq!(device.polls.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_wait_inside_another_leaves_the_outer_one_as_it_was() {
        let (outer, device) = ticket();
        let both = async move {
            let (inner, _) = ticket();
            let inner = inner.wait()?;
            Ok(inner + outer.await?)
        };
        assert_eq!(block_on(both), Result::Ok(14));
        assert_eq!(*device.waited.lock().unwrap(), [thread::current().id()]);
    }

    /// Counts how often it is woken, and lets a thread wait for that.
    #[derive(Default)]
    struct Woken(Mutex<usize>, Condvar);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            *self.0.lock().unwrap() += 1;
            self.1.notify_all();
        }
    }

    #[test]
    fn another_executor_is_woken_and_its_poll_never_waits() {
        let (mut ticket, device) = ticket();
        let woken = Arc::<Woken>::default();
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        assert!(Pin::new(&mut ticket).poll(&mut cx).is_pending());
        let count = woken.0.lock().unwrap();
        drop(woken.1.wait_while(count, |count| *count == 0).unwrap());
        assert_eq!(Pin::new(&mut ticket).poll(&mut cx), Poll::Ready(Ok(7)));
        assert_ne!(*device.waited.lock().unwrap(), [thread::current().id()]);
        assert_eq!(*woken.0.lock().unwrap(), 1);
    }

    #[test]
    fn a_future_without_a_device_is_slept_for() {
        let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
        let helper = thread::spawn(move || receiver.recv().unwrap().wake());
        let mut polls = 0;
        let counted = std::future::poll_fn(|cx| {
            polls += 1;
            if polls == 1 {
                sender.send(cx.waker().clone()).unwrap();
                return Poll::Pending;
            }
            Poll::Ready(polls)
        });
        assert!(block_on(counted) >= 2);
        helper.join().unwrap();
    }
}

//! Groups whose devices exchange results by themselves: the bits of those whose results pass through the host, and what happens
//! when one of them fails. The devices are emulated, each with a number of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{Fixture, reference};
use crate::emulated::{ORDERS, machine_at, open_at};
use crate::group::degrees;
use crate::groups::run;
use crate::harness;
use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::cuda::machine::{Answers, Buffer, Machine, Memory, Work};
use kimi_linear::backend::{
    Backend, CollectiveId, Collectives, Device, DrawCapacity, Group, Result, Step, StepOutput,
    Ticket,
};
use kimi_linear::config::ModelConfig;
use kimi_linear::error::BackendError;
use kimi_linear::model::{Model, StepOptions};

const BLOCKS: usize = 8;

fn group(of: [usize; 3], open: impl Fn(usize) -> Box<dyn Backend>) -> Group {
    let config = ModelConfig::from_file(&reference("tiny-8").join("config.json")).unwrap();
    let degrees = degrees(of);
    let ranks = (0..degrees.ranks()).map(open).collect();
    Group::new(ranks, degrees, &config).unwrap()
}

fn load(group: Group) -> Model {
    let limits = harness::limits(32, BLOCKS, group.device().cache);
    harness::load("tiny-8", Box::new(group), limits)
}

fn prompt() -> Vec<u32> {
    Fixture::open("tiny-8/expected.safetensors").ids("prompt.24.tokens")
}

/// Sums are added in the order of the ranks in both, and rows of experts are added to zeros.
#[test]
fn devices_that_exchange_results_have_the_bits_of_those_that_the_host_exchanges_for() {
    let tokens = prompt();
    for of in [
        [2, 1, 1],
        [4, 1, 1],
        [1, 2, 1],
        [1, 4, 1],
        [2, 2, 1],
        [4, 4, 1],
        [2, 1, 2],
        [2, 2, 2],
    ] {
        // The same device for all ranks: it would wait for itself.
        let alike = group(of, |_| open_at(0, &ORDERS[..1]));
        assert!(!alike.exchanges_on_devices());
        let different = group(of, |rank| open_at(rank, &ORDERS[..1]));
        assert!(different.exchanges_on_devices());
        let traffic = different.traffic();
        let expected = run(&mut load(alike), &tokens, 11);
        let found = run(&mut load(different), &tokens, 11);
        assert!(found == expected, "{of:?}: other bits");
        let sent = traffic.sent.load(Ordering::Relaxed);
        assert_eq!(sent > 0, of[2] > 1, "{of:?}: {sent} bytes through the host");
    }
}

/// Where a machine fails.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    /// Before any command of a step.
    Before,
    /// In the middle of its commands.
    Halfway,
    /// When its answer is awaited.
    After,
}

/// A machine that fails in one step.
struct Failing {
    inner: Arc<dyn Machine>,
    at: Where,
    /// Steps before the one that fails.
    left: AtomicUsize,
}

impl Machine for Failing {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>> {
        self.inner.allocate(what, bytes)
    }

    fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()> {
        self.inner.write(buffer, start, bytes)
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        if work.upload.is_none() || self.left.fetch_sub(1, Ordering::Relaxed) != 1 {
            return self.inner.submit(work);
        }
        let error = BackendError::Driver {
            backend: "cuda-emulated",
            what: "a step".to_owned(),
            reason: format!("a test injected this: {:?}", self.at),
        };
        if self.at == Where::Halfway {
            let commands = &work.commands[..work.commands.len() / 2];
            self.inner.submit(&Work { commands, ..*work })?;
        }
        match self.at {
            Where::Before | Where::Halfway => Err(error),
            Where::After => {
                let ticket = self.inner.submit(work)?;
                Ok(Ticket::new(async move {
                    ticket.await?;
                    Err(error)
                }))
            }
        }
    }

    fn forget(&self, step: u64) {
        self.inner.forget(step);
    }

    fn collectives(&self) -> Collectives {
        self.inner.collectives()
    }

    fn collective_id(&self) -> Result<CollectiveId> {
        self.inner.collective_id()
    }

    fn join(&self, id: CollectiveId, rank: usize, ranks: usize) -> Result<()> {
        self.inner.join(id, rank, ranks)
    }

    fn leave(&self) {
        self.inner.leave();
    }
}

fn step(model: &mut Model) -> Box<dyn Step> {
    let options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: DrawCapacity::NONE,
    };
    model.step(model.limits().step, options).unwrap()
}

#[test]
fn a_rank_that_fails_does_not_hold_up_the_others() {
    let tokens = prompt();
    for (of, rank) in [
        ([2, 1, 1], 0),
        ([2, 1, 1], 1),
        ([1, 4, 1], 2),
        ([4, 4, 1], 3),
    ] {
        let sound = group(of, |index| open_at(index, &ORDERS[..1]));
        let expected = run(&mut load(sound), &tokens, 11);
        for at in [Where::Before, Where::Halfway, Where::After] {
            let group = group(of, |index| {
                let inner = machine_at(index, &ORDERS[..1]);
                let left = AtomicUsize::new(if index == rank { 2 } else { 0 });
                let machine = Arc::new(Failing { inner, at, left });
                Box::new(CudaBackend::over(machine))
            });
            let mut model = load(group);
            let mut step = step(&mut model);
            let mut submit = |from: usize, to: usize| -> Result<StepOutput> {
                let batch = harness::batch(&tokens[from..to], from, BLOCKS);
                step.submit(&batch)?.wait()
            };
            submit(0, 5).unwrap();
            // The second step fails, and so does every later one until they join again: the devices have left each other.
            let error = submit(5, 9).unwrap_err();
            assert!(matches!(error, BackendError::Lost { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains("a test injected this"),
                "{of:?} {at:?}: {text}"
            );
            let error = submit(9, 12).unwrap_err();
            assert!(matches!(error, BackendError::Lost { .. }), "{error}");
            drop(step);
            model.backend().recover().unwrap();
            let found = run(&mut model, &tokens, 11);
            assert!(found == expected, "{of:?} {at:?}: other bits afterwards");
        }
    }
}

/// A batch that is refused is refused before any rank has it.
#[test]
fn a_refused_batch_is_no_loss() {
    let tokens = prompt();
    let mut model = load(group([2, 1, 1], |rank| open_at(rank, &ORDERS[..1])));
    let mut step = step(&mut model);
    let error = step.submit(&harness::batch(&[u32::MAX], 0, BLOCKS)).err();
    assert!(
        matches!(error, Some(BackendError::TokenOutOfRange { .. })),
        "{error:?}"
    );
    let batch = harness::batch(&tokens, 0, BLOCKS);
    step.submit(&batch).unwrap().wait().unwrap();
}

/// Devices where NCCL is missing use the host, aloud.
#[test]
fn a_device_that_lacks_a_library_leaves_exchanges_to_the_host() {
    struct Lacking(Arc<dyn Machine>);

    impl Machine for Lacking {
        fn device(&self) -> &Device {
            self.0.device()
        }

        fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>> {
            self.0.allocate(what, bytes)
        }

        fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()> {
            self.0.write(buffer, start, bytes)
        }

        fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
            self.0.submit(work)
        }

        fn forget(&self, step: u64) {
            self.0.forget(step);
        }

        fn collectives(&self) -> Collectives {
            Collectives::Missing("a library is not found".to_owned())
        }
    }

    let group = group([2, 1, 1], |rank| {
        let inner = machine_at(rank, &ORDERS[..1]);
        Box::new(CudaBackend::over(Arc::new(Lacking(inner))))
    });
    assert!(!group.exchanges_on_devices());
    let mut model = load(group);
    let batch = harness::batch(&prompt(), 0, BLOCKS);
    step(&mut model).submit(&batch).unwrap().wait().unwrap();
}

//! Both GPU backends with each call of their device failing, while a model is loaded and while the engine runs: a typed error
//! with its scope, no panic, no hang, and the next request is served unless the device is lost.

use std::sync::Arc;

use crate::engine_harness::common::reference;
use crate::engine_harness::{BLOCK, OPTIONS, Outcome, answer, limits, request, tokens};
use crate::faulty_machine::FaultyMachine;
use crate::group::degrees;
use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::wgpu::{Fault, Faults, WgpuBackend};
use kimi_linear::backend::{Backend, Group, block_on};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::{Engine, EngineOptions, Event, Request, RequestId};
use kimi_linear::error::{BackendError, Error, Scope};
use kimi_linear::model::{Limits, Model};
use kimi_linear_emulated::Order;

/// More steps than any schedule here needs: a schedule that needs more hangs.
const MOST_STEPS: usize = 200;
const FAULTS: [Fault; 3] = [Fault::Refused, Fault::OutOfMemory, Fault::Lost];

/// A device into whose calls failures can be injected.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Wgpu,
    Cuda,
    /// The second of two emulated GPUs that exchange results by themselves.
    SecondOfTwo,
}

/// A backend, and the calls of its device.
fn open(kind: Kind) -> (Box<dyn Backend>, Arc<Faults>) {
    match kind {
        Kind::Wgpu => {
            let backend = WgpuBackend::new().unwrap_or_else(|error| {
                panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
            });
            let faults = backend.faults();
            (Box::new(backend), faults)
        }
        Kind::Cuda => {
            let faults = Arc::<Faults>::default();
            let machine = FaultyMachine::new(crate::emulated::machine(&[Order::Forward]), &faults);
            (Box::new(CudaBackend::over(Arc::new(machine))), faults)
        }
        Kind::SecondOfTwo => {
            let faults = Arc::<Faults>::default();
            let machine = |index| crate::emulated::machine_at(index, &[Order::Forward]);
            let second = FaultyMachine::new(machine(1), &faults);
            let ranks: [Box<dyn Backend>; 2] = [
                Box::new(CudaBackend::over(machine(0))),
                Box::new(CudaBackend::over(Arc::new(second))),
            ];
            let config = ModelConfig::from_file(&reference("tiny-a").join("config.json")).unwrap();
            let group = Group::new(ranks.into(), degrees([2, 1, 1]), &config).unwrap();
            assert!(group.exchanges_on_devices());
            (Box::new(group), faults)
        }
    }
}

fn pools() -> Limits {
    limits(2, 4, 8)
}

fn load(backend: Box<dyn Backend>) -> Result<Model, Error> {
    let dir = reference("tiny-a");
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    let cache = backend.device().cache;
    let limits = Limits { cache, ..pools() };
    Model::load(&config, &checkpoint, backend, limits, &mut |_| {})
}

fn engine(model: Model, cached_steps: usize) -> Engine {
    let options = EngineOptions {
        cached_steps,
        ..OPTIONS
    };
    Engine::new(model, options)
}

/// A prompt within one step.
fn short() -> Vec<Request> {
    vec![request(tokens(3, 3), 1)]
}

/// A prompt of several segments, and one that continues from its cached prefix.
fn shared() -> Vec<Request> {
    let common = tokens(1, BLOCK + 3);
    let longer = [common.clone(), tokens(2, 2)].concat();
    vec![request(common, 2), request(longer, 2)]
}

/// Whether this is the error of such a fault, with its scope. In a step of ranks that wait for each other every error loses them
/// all; they join again afterwards.
fn is_planted(kind: Kind, error: &Error, fault: Fault) -> bool {
    let Error::Backend(error) = error else {
        return false;
    };
    if let (Kind::SecondOfTwo, BackendError::Lost { reason, .. }) = (kind, error) {
        return reason.contains(match fault {
            Fault::Refused | Fault::Lost => "a test injected",
            Fault::OutOfMemory => "not enough memory",
        });
    }
    match fault {
        Fault::Refused => {
            matches!(error, BackendError::Driver { reason, .. } if reason.contains("a test injected"))
                && error.scope() == Scope::Step
        }
        Fault::OutOfMemory => {
            matches!(error, BackendError::OutOfMemory { .. }) && error.scope() == Scope::Step
        }
        Fault::Lost => matches!(error, BackendError::Lost { .. }) && error.scope() == Scope::Device,
    }
}

/// Requests one after the other; returns the errors of those that failed.
fn run(engine: &mut Engine, requests: Vec<Request>, what: &str) -> Vec<Arc<Error>> {
    let mut errors = Vec::new();
    for (id, request) in (0..).zip(requests) {
        engine.submit(RequestId(id), request).unwrap();
        let more = (0..MOST_STEPS).any(|_| !block_on(engine.step()));
        assert!(more, "{what}: it does not end");
        let mut ends = 0;
        for (_, event) in engine.take_events() {
            match event {
                Event::Failed(error) => {
                    errors.push(error);
                    ends += 1;
                }
                Event::Finished { .. } => ends += 1,
                _ => {}
            }
        }
        assert_eq!(ends, 1, "{what}: request {id}");
    }
    errors
}

/// A request afterwards; without a cached prefix, so that its answer is known to the bit.
fn next(engine: &mut Engine) -> Outcome {
    let request = Request {
        reuse: false,
        ..request(tokens(9, 6), 2)
    };
    answer(engine, request)
}

fn nothing_held(engine: &mut Engine, what: &str) {
    engine.clear_cache();
    let left = engine.occupancy();
    assert_eq!((left.slots, left.blocks), (0, 0), "{what}");
}

/// Loads the model once for each call of its loading, which fails.
fn each_call_of_a_load_fails(kind: Kind) {
    let (backend, faults) = open(kind);
    faults.set(None);
    drop(load(backend).unwrap());
    let calls = faults.calls();
    println!("{kind:?}: {calls} calls");
    for at in 0..calls {
        let fault = FAULTS[at % FAULTS.len()];
        let (backend, faults) = open(kind);
        faults.set(Some((at, fault)));
        let error = load(backend).map(drop).expect_err("a load that fails");
        assert!(
            is_planted(kind, &error, fault),
            "call {at} of {calls}: {error}"
        );
    }
}

/// One engine, and requests once for each of their calls, which fails without losing the device: each time the engine
/// continues. If `warm`, steps are compiled before.
fn each_call_of_requests_fails(kind: Kind, requests: fn() -> Vec<Request>, warm: bool) {
    let (backend, faults) = open(kind);
    // Only one step is cached, so each compiled step evicts another: all steps are compiled again each time.
    let mut engine = engine(load(backend).unwrap(), if warm { 16 } else { 1 });
    let sound = next(&mut engine);
    assert_eq!(sound.error, None);
    for at in 0.. {
        let fault = [Fault::Refused, Fault::OutOfMemory][at % 2];
        let what = format!("{kind:?}, {fault:?} at call {at}");
        if warm {
            assert!(run(&mut engine, requests(), &what).is_empty());
            engine.clear_cache();
        }
        faults.set(Some((at, fault)));
        let errors = run(&mut engine, requests(), &what);
        let over = faults.calls() <= at;
        faults.set(None);
        assert_eq!(errors.len(), usize::from(!over), "{what}: {errors:?}");
        let planted = errors.iter().all(|error| is_planted(kind, error, fault));
        assert!(planted, "{what}: {errors:?}");
        assert_eq!(next(&mut engine).said(), sound.said(), "{what}");
        nothing_held(&mut engine, &what);
        if over {
            println!("{kind:?}: {at} calls");
            assert!(at > 3);
            break;
        }
    }
}

/// An engine for each of a number of calls of the schedule, at which the device is lost: all later calls return that error.
fn the_device_is_lost(kind: Kind, places: usize) {
    let (backend, faults) = open(kind);
    let mut sound = engine(load(backend).unwrap(), 16);
    faults.set(None);
    assert!(run(&mut sound, shared(), "no fault").is_empty());
    let calls = faults.calls();
    for place in 0..places {
        let at = place * (calls - 1) / (places - 1);
        let what = format!("{kind:?}, lost at call {at} of {calls}");
        let (backend, faults) = open(kind);
        let mut engine = engine(load(backend).unwrap(), 16);
        faults.set(Some((at, Fault::Lost)));
        let errors = run(&mut engine, shared(), &what);
        assert!(!errors.is_empty(), "{what}: nobody was told");
        for error in &errors {
            assert!(is_planted(kind, error, Fault::Lost), "{what}: {error}");
        }
        let error = next(&mut engine).error.expect("a device that was lost");
        assert!(error.contains("device was lost"), "{what}: {error}");
        nothing_held(&mut engine, &what);
    }
}

#[test]
fn each_call_of_a_load_fails_in_turn_on_wgpu() {
    each_call_of_a_load_fails(Kind::Wgpu);
}

#[test]
fn each_call_of_a_load_fails_in_turn_on_cuda() {
    each_call_of_a_load_fails(Kind::Cuda);
}

#[test]
fn each_call_of_a_load_fails_in_turn_on_a_rank() {
    each_call_of_a_load_fails(Kind::SecondOfTwo);
}

#[test]
fn each_call_of_requests_fails_in_turn_on_wgpu() {
    each_call_of_requests_fails(Kind::Wgpu, shared, true);
}

#[test]
fn each_call_of_requests_fails_in_turn_on_cuda() {
    each_call_of_requests_fails(Kind::Cuda, shared, false);
}

#[test]
fn each_call_of_requests_fails_in_turn_on_a_rank() {
    each_call_of_requests_fails(Kind::SecondOfTwo, short, false);
}

#[test]
fn each_call_of_compiling_and_a_step_fails_in_turn_on_wgpu() {
    each_call_of_requests_fails(Kind::Wgpu, short, false);
}

#[test]
fn a_wgpu_device_is_lost_at_many_calls() {
    the_device_is_lost(Kind::Wgpu, 12);
}

#[test]
fn a_cuda_device_is_lost_at_many_calls() {
    the_device_is_lost(Kind::Cuda, 12);
}

/// The other rank does not wait for it.
#[test]
fn a_rank_is_lost_at_many_calls() {
    the_device_is_lost(Kind::SecondOfTwo, 12);
}

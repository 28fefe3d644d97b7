//! Devices that fail: a change that cannot be made leaves everything as it was, and a replica goes on without a device that is gone.

use std::sync::{Mutex, PoisonError};

use super::*;
use crate::faulty::{Fault, Faulty, Plan, Shared};
use kimi_linear::backend::MemoryUse;
use kimi_linear::error::BackendError;

/// A CPU whose calls fail as planned.
fn faulty() -> (Box<dyn Backend>, Shared) {
    let plan: Shared = Arc::new(Mutex::new(Plan::default()));
    (Box::new(Faulty::new(backends::cpu(), &plan)), plan)
}

/// Lets the call that comes after `calls` others fail; `None` lets none.
fn fail(plan: &Shared, fault: Option<(usize, Fault)>) {
    let mut plan = plan.lock().unwrap_or_else(PoisonError::into_inner);
    plan.fault = fault.map(|(calls, fault)| (plan.calls + calls, fault));
}

/// Every call of a move fails once, on either device: the layer stays where it was, with its caches and its memory.
#[test]
fn a_move_that_fails_changes_nothing() {
    let expected = alone();
    let mut failures = 0;
    for (layer, to) in [
        (1, LayerHome::whole(1)),
        (2, LayerHome::whole(1)),
        (3, home(0, &[0, 1])),
        (4, home(1, &[0, 1])),
    ] {
        for device in 0..2 {
            let [(first, one), (second, other)] = [faulty(), faulty()];
            let plans = [one, other];
            let replicas = replicas(vec![first, second]);
            let mut model = model(&replicas, 0);
            let memory = |replicas: &Replicas| -> [MemoryUse; 2] {
                [0, 1].map(|device| MemoryUse {
                    activations: 0,
                    ..replicas.memory(device)
                })
            };
            let before = memory(&replicas);
            let mut calls = 0;
            let mut moved = false;
            let found = Sequence::run(&mut model, |model, submission| {
                // All of them before the first half is over.
                while submission == 3 && !moved {
                    fail(&plans[device], Some((calls, Fault::Memory)));
                    calls += 1;
                    let placed = model.backend().place(layer, &to, Caches::Keep);
                    fail(&plans[device], None);
                    match placed {
                        Ok(()) => moved = true,
                        Err(error) => {
                            assert!(matches!(error, BackendError::OutOfMemory { .. }), "{error}");
                            assert_eq!(memory(&replicas), before, "call {calls}");
                            failures += 1;
                        }
                    }
                }
            });
            assert!(found == expected, "layer {layer}, device {device}");
        }
    }
    assert!(failures > 40, "{failures} failures");
}

/// A device that is lost in a step: the replica places its layers at home, and computes again from the tokens.
#[test]
fn a_replica_goes_on_without_a_device_that_is_gone() {
    let expected = alone();
    for homes in [experts(0, &[0, 1]), layers(2), layers(0)] {
        let (other, plan) = faulty();
        let replicas = replicas(vec![backends::cpu(), other]);
        let mut model = model(&replicas, 0);
        let mut sequence = Sequence::default();
        place(&mut model, &homes, Caches::Keep);
        for _ in 0..3 {
            sequence.go_on(&mut model).unwrap();
        }
        model.resize(4, BLOCKS + 2).unwrap();
        assert!(!replicas.lost(1));
        fail(&plan, Some((1, Fault::Lost)));
        let error = sequence.go_on(&mut model).unwrap_err();
        assert!(matches!(error, BackendError::Lost { .. }), "{error}");
        assert!(replicas.lost(1), "{homes:?}");
        assert_eq!(replicas.memory(1), MemoryUse::default());
        // It is not called any more.
        let calls = plan.lock().unwrap().calls;
        let error = sequence.go_on(&mut model).unwrap_err();
        assert!(error.to_string().contains("device 1 is gone"), "{error}");
        let keeps = model.backend().place(4, &LayerHome::whole(0), Caches::Keep);
        assert_eq!(keeps.is_err(), homes[4].device == 1, "{homes:?}");
        replicas.lose(1);
        model.resize(2, BLOCKS).unwrap();
        place(&mut model, &whole(0), Caches::Discard);
        model.backend().recover().unwrap();
        let found = Sequence::run(&mut model, |_, _| ());
        assert!(found == expected, "{homes:?}: other bits");
        assert_eq!(plan.lock().unwrap().calls, calls);
        let states = model.states().layout;
        assert_eq!(states.slots, 2);
        assert_eq!(replicas.memory(0).states, states.bytes());
        let error = model.backend().place(1, &LayerHome::whole(1), Caches::Keep);
        assert!(matches!(error, Err(BackendError::Lost { .. })));
        drop(model);
        assert_eq!(plan.lock().unwrap().calls, calls);
        assert_eq!(replicas.memory(0).weights, 0);
    }
}

/// The replica whose own device is gone ends, and others go on with theirs.
#[test]
fn a_replica_without_its_own_device_ends() {
    let (first, plan) = faulty();
    let replicas = replicas(vec![first, backends::cpu()]);
    let mut models = [model(&replicas, 0), model(&replicas, 1)];
    let expected = alone();
    plan.lock().unwrap().lost = true;
    let mut sequence = Sequence::default();
    let error = sequence.go_on(&mut models[0]).unwrap_err();
    assert!(matches!(error, BackendError::Lost { .. }), "{error}");
    replicas.lose(0);
    assert!(models[0].backend().recover().is_err());
    let [ended, mut other] = models;
    drop(ended);
    assert!(Sequence::run(&mut other, |_, _| ()) == expected);
}

/// A failure that is no loss is an error of that step only.
#[test]
fn a_step_that_fails_can_be_repeated() {
    let expected = alone();
    for homes in [experts(0, &[0, 1]), layers(2)] {
        for fault in [Fault::Refused, Fault::Ticket, Fault::Memory] {
            let (other, plan) = faulty();
            let replicas = replicas(vec![backends::cpu(), other]);
            let mut model = model(&replicas, 0);
            place(&mut model, &homes, Caches::Keep);
            // Compiling and copies before its first part.
            for calls in 1..4 {
                fail(&plan, Some((calls, fault)));
                let error = Sequence::default().go_on(&mut model).unwrap_err();
                assert_eq!(error, fault.error());
            }
            assert!(!replicas.lost(1));
            let found = Sequence::run(&mut model, |_, _| ());
            assert!(found == expected, "{homes:?} {fault:?}");
        }
    }
}

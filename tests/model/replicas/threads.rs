//! Two replicas in two threads, whose homes change all the time, each alone: both answer as one device does.

use std::thread;

use super::*;
use crate::seeds;

/// Numbers that a seed determines.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, count: usize) -> usize {
        // Knuth's multiplicative congruential generator; its high bits are good enough to choose homes.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % count
    }

    fn home(&mut self, replica: usize) -> LayerHome {
        let homes = [
            LayerHome::whole(replica),
            LayerHome::whole(1 - replica),
            home(replica, &[0, 1]),
            home(1 - replica, &[0, 1]),
            home(replica, &[1, 0]),
        ];
        homes[self.below(homes.len())].clone()
    }
}

fn run(seed: u64) {
    seeds::printed(seed);
    let expected = alone();
    let replicas = on_cpus(2);
    let mut models = [model(&replicas, 0), model(&replicas, 1)];
    let memory = || {
        [0, 1].map(|device| {
            (
                replicas.memory(device).weights,
                replicas.memory(device).states,
            )
        })
    };
    let before = memory();
    thread::scope(|scope| {
        for (replica, model) in models.iter_mut().enumerate() {
            let expected = &expected;
            scope.spawn(move || {
                let mut numbers = Numbers(seed.wrapping_add(replica as u64));
                for round in 0..8 {
                    let found = Sequence::run(model, |model, _| {
                        for _ in 0..numbers.below(3) {
                            let layer = numbers.below(LAYERS);
                            let home = numbers.home(replica);
                            model.backend().place(layer, &home, Caches::Keep).unwrap();
                        }
                    });
                    assert!(found == *expected, "replica {replica}, round {round}");
                }
                place(model, &whole(replica), Caches::Keep);
            });
        }
    });
    assert_eq!(memory(), before);
}

#[test]
fn two_replicas_change_their_homes_at_the_same_time() {
    run(seeds::FIXED);
    run(seeds::drawn());
}

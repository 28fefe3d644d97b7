//! A backend that records its router's choices, or replaces them by those of another run: one different expert changes a
//! small model's logits by a tenth, which would hide all other errors.
#![allow(unreachable_pub, missing_docs, dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kimi_linear::backend::*;

use crate::wrapped::{Part, Wrap, Wrapped};

/// Experts and weights of one router at one position of the only sequence.
pub type Choices = BTreeMap<(usize, usize), (Vec<u32>, Vec<f32>)>;

/// A chosen expert that the other run did not choose.
#[derive(Clone, Copy, Debug)]
pub struct Flip {
    pub router: usize,
    pub position: usize,
    /// The difference between the weights of the expert that was chosen and of the one that was not.
    pub gap: f32,
}

/// What is done with the router's choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Records them in `choices`.
    Keep,
    /// Compares them with `choices`.
    Watch,
    /// The same, then replaces them by `choices`.
    Replace,
}

/// State that the wrapper and the test share.
#[derive(Default)]
pub struct Log {
    pub choices: Choices,
    pub flips: Vec<Flip>,
}

/// The wrapper.
#[derive(Clone)]
pub struct Replay {
    mode: Mode,
    log: Arc<Mutex<Log>>,
    /// Number of the program's routers so far.
    routers: usize,
}

impl Replay {
    pub fn around(inner: Box<dyn Backend>, mode: Mode, log: &Arc<Mutex<Log>>) -> Wrapped<Self> {
        let replay = Self {
            mode,
            log: Arc::clone(log),
            routers: 0,
        };
        Wrapped::new(inner, replay)
    }

    /// Compares, records or replaces the choices of one router over the rows of a batch.
    fn look(
        &self,
        backend: &mut dyn Backend,
        router: usize,
        op: &Route,
        batch: &Batch,
    ) -> Result<()> {
        let top_k = op.experts.width;
        let rows = batch.tokens.len();
        let ids = backend.read_tensor(op.experts, rows).wait()?;
        let weights = backend.read_tensor(op.weights, rows).wait()?;
        let mut ids = ids.as_index().unwrap().to_vec();
        let mut weights = weights.as_f32().unwrap().to_vec();
        let positions = batch
            .segments
            .iter()
            .flat_map(|segment| segment.position..segment.position + segment.length);
        let mut log = self.log.lock().unwrap();
        for (row, position) in positions.enumerate() {
            let range = row * top_k..(row + 1) * top_k;
            let (own, own_weights) = (&mut ids[range.clone()], &mut weights[range]);
            if self.mode == Mode::Keep {
                let kept = (own.to_vec(), own_weights.to_vec());
                log.choices.insert((router, position), kept);
                continue;
            }
            let (theirs, their_weights) = log.choices[&(router, position)].clone();
            for (id, weight) in own.iter().zip(own_weights.iter()) {
                if !theirs.contains(id) {
                    let missed = theirs.iter().position(|their| !own.contains(their));
                    let gap = (weight - their_weights[missed.unwrap_or(0)]).abs();
                    log.flips.push(Flip {
                        router,
                        position,
                        gap,
                    });
                }
            }
            own.copy_from_slice(&theirs);
            own_weights.copy_from_slice(&their_weights);
        }
        if self.mode == Mode::Replace {
            backend.write_tensor(op.experts, &TensorValues::Index(ids))?;
            backend.write_tensor(op.weights, &TensorValues::F32(weights))?;
        }
        Ok(())
    }
}

impl Replay {
    /// A router, whose choices are processed afterwards; other operations are not changed.
    fn part(&mut self, op: &Op) -> Part {
        let Op::Route(route) = op else {
            return Part::plain(op.clone());
        };
        let (route, router, replay) = (*route, self.routers, self.clone());
        self.routers += 1;
        Part::after(op.clone(), move |backend, batch| {
            replay.look(backend, router, &route, batch)
        })
    }
}

/// A program is cut after each router; other blocks stay whole.
impl Wrap for Replay {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        match op {
            Op::Embed(_) => self.routers = 0,
            Op::MoeBlock(block) => {
                return Ok(block.ops().iter().map(|op| self.part(op)).collect());
            }
            _ => {}
        }
        Ok(vec![self.part(op)])
    }
}

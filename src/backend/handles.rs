//! What a backend keeps under its handles: one table for each kind of them.
//!
//! A handle of another backend is refused where it can be seen: by a number that is not there, or a shape that is not the
//! one under its number.

use super::{LatentPool, Program, Result, StatePool, Tensor, Weight};
use crate::error::BackendError;

/// A handle that a backend gives out.
pub(super) trait Handle: Copy + PartialEq {
    /// What it names, for messages.
    const WHAT: &'static str;

    /// Its place in the table.
    fn id(&self) -> usize;
}

macro_rules! handles {
    ($($handle:ty = $what:literal),*) => {$(
        impl Handle for $handle {
            const WHAT: &'static str = $what;

            fn id(&self) -> usize {
                self.id
            }
        }
    )*};
}
handles!(
    Weight = "the weight",
    Tensor = "the tensor",
    StatePool = "the state pool",
    LatentPool = "the latent pool"
);

/// What is kept under handles of one kind.
pub(super) struct Table<H, V>(Vec<(H, V)>);

impl<H, V> Default for Table<H, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<H: Handle, V> Table<H, V> {
    /// Keeps `value` under the handle that `make` makes of its number.
    pub(super) fn add(&mut self, value: V, make: impl FnOnce(usize) -> H) -> H {
        let handle = make(self.0.len());
        self.0.push((handle, value));
        handle
    }

    /// Fails unless this table gave the handle out.
    pub(super) fn check(&self, backend: &'static str, handle: H) -> Result<()> {
        match self.0.get(handle.id()) {
            Some((known, _)) if *known == handle => Ok(()),
            _ => Err(BackendError::Shape {
                operation: backend,
                what: H::WHAT,
                expected: "one that this backend made".to_owned(),
                found: "another backend's".to_owned(),
            }),
        }
    }

    /// What is under a handle.
    ///
    /// # Errors
    /// A handle that this table did not give out.
    pub(super) fn get(&self, backend: &'static str, handle: H) -> Result<&V> {
        self.check(backend, handle)?;
        Ok(self.known(handle))
    }

    /// The same, to be changed.
    pub(super) fn get_mut(&mut self, backend: &'static str, handle: H) -> Result<&mut V> {
        self.check(backend, handle)?;
        Ok(self.known_mut(handle))
    }

    /// What is under a handle that was checked before.
    pub(super) fn known(&self, handle: H) -> &V {
        &self.0[handle.id()].1
    }

    /// The same, to be changed.
    pub(super) fn known_mut(&mut self, handle: H) -> &mut V {
        &mut self.0[handle.id()].1
    }

    /// The handles given out.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(super) fn handles(&self) -> impl Iterator<Item = &H> {
        self.0.iter().map(|(handle, _)| handle)
    }
}

/// The tables of a backend.
pub(super) struct Handles<W, T, S, L> {
    pub(super) backend: &'static str,
    pub(super) weights: Table<Weight, W>,
    pub(super) tensors: Table<Tensor, T>,
    pub(super) states: Table<StatePool, S>,
    pub(super) latents: Table<LatentPool, L>,
}

impl<W, T, S, L> Handles<W, T, S, L> {
    /// Those of a backend of this name, empty.
    pub(super) fn new(backend: &'static str) -> Self {
        Self {
            backend,
            weights: Table::default(),
            tensors: Table::default(),
            states: Table::default(),
            latents: Table::default(),
        }
    }

    /// Fails unless every handle of a program whose blocks were expanded is this backend's.
    pub(super) fn check(&self, program: &Program) -> Result<()> {
        for op in &program.ops {
            let operands = op.operands();
            let mut tensors = operands.reads.iter().chain(&operands.writes);
            tensors.try_for_each(|tensor| self.tensors.check(self.backend, *tensor))?;
            let mut weights = operands.weights.iter();
            weights.try_for_each(|weight| self.weights.check(self.backend, *weight))?;
            match operands.pool {
                Some((super::Pool::States(pool), _)) => self.states.check(self.backend, pool)?,
                Some((super::Pool::Latents(pool), _)) => self.latents.check(self.backend, pool)?,
                None => {}
            }
        }
        Ok(())
    }
}

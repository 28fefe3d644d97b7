//! The tables behind a backend's handles, one for each kind.
//!
//! A handle of another backend is refused if it can be detected: by an unknown number, or by a shape that differs from the
//! entry's.

use super::{LatentPool, Program, Result, StatePool, Tensor, Weight};
use crate::error::BackendError;

/// A handle of a backend.
pub(super) trait Handle: Copy + PartialEq {
    /// Its kind, for messages.
    const WHAT: &'static str;

    /// Its index in the table.
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

/// The entries behind handles of one kind.
pub(super) struct Table<H, V>(Vec<(H, V)>);

impl<H, V> Default for Table<H, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<H: Handle, V> Table<H, V> {
    /// Adds `value`, with the handle that `make` creates from its number.
    pub(super) fn add(&mut self, value: V, make: impl FnOnce(usize) -> H) -> H {
        let handle = make(self.0.len());
        self.0.push((handle, value));
        handle
    }

    /// Fails unless this table created the handle.
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

    /// The entry of a handle.
    ///
    /// # Errors
    /// A handle that this table did not create.
    pub(super) fn get(&self, backend: &'static str, handle: H) -> Result<&V> {
        self.check(backend, handle)?;
        Ok(self.known(handle))
    }

    /// Mutable access to the entry of a handle.
    pub(super) fn get_mut(&mut self, backend: &'static str, handle: H) -> Result<&mut V> {
        self.check(backend, handle)?;
        Ok(self.known_mut(handle))
    }

    /// The entry of a handle that was checked before.
    pub(super) fn known(&self, handle: H) -> &V {
        &self.0[handle.id()].1
    }

    /// Mutable access to the entry of a handle that was checked before.
    pub(super) fn known_mut(&mut self, handle: H) -> &mut V {
        &mut self.0[handle.id()].1
    }

    /// All handles of the table.
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
    /// Empty tables for a backend of this name.
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

//! The tables behind a backend's handles, one for each kind.
//!
//! A handle of another backend is refused if it can be detected: by an unknown number, or by a shape that differs from the
//! entry's.

use std::sync::Arc;

use super::{LatentPool, Pool, Program, Result, StatePool, Tensor, Weight};
use crate::error::BackendError;

/// A handle of a backend.
pub(super) trait Handle: Copy + PartialEq {
    /// Its kind, for messages.
    const WHAT: &'static str;

    /// Its number.
    fn id(&self) -> usize;

    /// Whether the other one differs by the size of a pool at most.
    fn same_but_size(&self, other: &Self) -> bool;
}

macro_rules! handles {
    ($($handle:ty = $what:literal $(, size $($size:ident).+)?;)*) => {$(
        impl Handle for $handle {
            const WHAT: &'static str = $what;

            fn id(&self) -> usize {
                self.id
            }

            fn same_but_size(&self, other: &Self) -> bool {
                #[allow(unused_mut)]
                let mut other = *other;
                $(other.$($size).+ = self.$($size).+;)?
                *self == other
            }
        }
    )*};
}
handles!(
    Weight = "the weight";
    Tensor = "the tensor";
    StatePool = "the state pool", size layout.slots;
    LatentPool = "the latent pool", size layout.blocks;
);

/// An entry of a table.
struct Entry<H, V> {
    handle: H,
    value: V,
    /// Whether its handle is refused: steps that were compiled before may still use the value.
    released: bool,
    /// Shared with the steps that were compiled with it as it is now.
    users: Arc<()>,
}

/// What a step holds of an entry that it uses.
pub(super) struct Use<H> {
    handle: H,
    users: Arc<()>,
}

/// The entries behind handles of one kind.
pub(super) struct Table<H, V> {
    entries: Vec<Entry<H, V>>,
    /// The index of each handle's entry, by the handle's number; [`GONE`] if it was dropped. Numbers are never given twice.
    indices: Vec<usize>,
}

/// The index of an entry that was dropped.
const GONE: usize = usize::MAX;

impl<H, V> Default for Table<H, V> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            indices: Vec::new(),
        }
    }
}

impl<H: Handle, V> Table<H, V> {
    /// Adds `value`, with the handle that `make` creates from its number.
    pub(super) fn add(&mut self, value: V, make: impl FnOnce(usize) -> H) -> H {
        let handle = make(self.indices.len());
        self.indices.push(self.entries.len());
        self.entries.push(Entry {
            handle,
            value,
            released: false,
            users: Arc::default(),
        });
        handle
    }

    /// Fails unless this table created the handle and did not release it.
    pub(super) fn check(&self, backend: &'static str, handle: H) -> Result<()> {
        let index = self.indices.get(handle.id());
        let found = match index.and_then(|index| self.entries.get(*index)) {
            Some(entry) if entry.handle == handle && !entry.released => return Ok(()),
            None if index.is_some() => "one that was released",
            Some(entry) if entry.released => "one that was released",
            Some(entry) if entry.handle.same_but_size(&handle) => "one of before its size changed",
            _ => "another backend's",
        };
        Err(BackendError::Shape {
            operation: backend,
            what: H::WHAT,
            expected: "one that this backend made".to_owned(),
            found: found.to_owned(),
        })
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
        &self.entries[self.indices[handle.id()]].value
    }

    /// Mutable access to the entry of a handle that was checked before.
    pub(super) fn known_mut(&mut self, handle: H) -> &mut V {
        &mut self.entries[self.indices[handle.id()]].value
    }

    /// Changes an entry to one whose handle is `to`, of the same number. Steps that use the entry are refused from now on.
    pub(super) fn change(&mut self, to: H) {
        let entry = &mut self.entries[self.indices[to.id()]];
        entry.handle = to;
        entry.users = Arc::default();
    }

    /// Refuses a handle from now on. Its entry stays until [`Table::sweep`] finds that no step uses it.
    ///
    /// # Errors
    /// A handle that this table did not create.
    pub(super) fn release(&mut self, backend: &'static str, handle: H) -> Result<()> {
        self.check(backend, handle)?;
        self.entries[self.indices[handle.id()]].released = true;
        self.sweep();
        Ok(())
    }

    /// Drops released entries that no step uses.
    pub(super) fn sweep(&mut self) {
        if !self.entries.iter().any(|entry| entry.released) {
            return;
        }
        self.entries
            .retain(|entry| !entry.released || Arc::strong_count(&entry.users) > 1);
        self.indices.fill(GONE);
        for (index, entry) in self.entries.iter().enumerate() {
            self.indices[entry.handle.id()] = index;
        }
    }

    /// Notes that a step uses an entry.
    ///
    /// # Errors
    /// A handle that this table did not create.
    fn take(&self, backend: &'static str, handle: H) -> Result<Use<H>> {
        self.check(backend, handle)?;
        let entry = &self.entries[self.indices[handle.id()]];
        Ok(Use {
            handle,
            users: Arc::clone(&entry.users),
        })
    }

    /// Fails if an entry was released or changed since a step noted that it uses it.
    fn check_use(&self, backend: &'static str, used: &Use<H>) -> Result<()> {
        self.check(backend, used.handle)?;
        let entry = &self.entries[self.indices[used.handle.id()]];
        if Arc::ptr_eq(&entry.users, &used.users) {
            return Ok(());
        }
        Err(BackendError::Shape {
            operation: backend,
            what: H::WHAT,
            expected: "as it was when the step was compiled".to_owned(),
            found: "another one since".to_owned(),
        })
    }

    /// All handles that are not released.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(super) fn handles(&self) -> impl Iterator<Item = &H> {
        let live = self.entries.iter().filter(|entry| !entry.released);
        live.map(|entry| &entry.handle)
    }

    /// All entries, also those that are released and in use, with their handles.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&H, &V)> {
        let entries = self.entries.iter();
        entries.map(|entry| (&entry.handle, &entry.value))
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

    /// Fails unless every handle of a program whose blocks were expanded is this backend's; returns what a step of it uses.
    pub(super) fn check(&self, program: &Program) -> Result<Uses> {
        let mut uses = Uses::default();
        for op in &program.ops {
            let operands = op.operands();
            let mut tensors = operands.reads.iter().chain(&operands.writes);
            tensors.try_for_each(|tensor| self.tensors.check(self.backend, *tensor))?;
            for weight in operands.weights {
                uses.weights.push(self.weights.take(self.backend, weight)?);
            }
            match operands.pool {
                Some((Pool::States(pool), _)) => {
                    add(&mut uses.states, self.states.take(self.backend, pool)?);
                }
                Some((Pool::Latents(pool), _)) => {
                    add(&mut uses.latents, self.latents.take(self.backend, pool)?);
                }
                None => {}
            }
        }
        Ok(uses)
    }

    /// Fails if a pool of a step was released or resized since the step was compiled.
    pub(super) fn check_uses(&self, uses: &Uses) -> Result<()> {
        let mut states = uses.states.iter();
        states.try_for_each(|pool| self.states.check_use(self.backend, pool))?;
        let mut latents = uses.latents.iter();
        latents.try_for_each(|pool| self.latents.check_use(self.backend, pool))
    }

    /// Drops what was released and is not used any more: called when a step has dropped its [`Uses`].
    pub(super) fn sweep(&mut self) {
        self.weights.sweep();
        self.states.sweep();
        self.latents.sweep();
    }
}

/// What a step uses that may be released or resized while the step exists.
#[derive(Default)]
pub(super) struct Uses {
    weights: Vec<Use<Weight>>,
    states: Vec<Use<StatePool>>,
    latents: Vec<Use<LatentPool>>,
}

/// Adds a pool unless it is there.
fn add<H: Handle>(pools: &mut Vec<Use<H>>, pool: Use<H>) {
    if !pools.iter().any(|known| known.handle == pool.handle) {
        pools.push(pool);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{LatentLayout, Shard};
    use crate::config::Dtype;

    fn weight(id: usize) -> Weight {
        Weight {
            id,
            stack: 1,
            rows: 2,
            columns: 3,
            shard: Shard::WHOLE,
        }
    }

    #[test]
    fn a_number_is_given_once_and_a_released_handle_refused() {
        let mut table = Table::default();
        let [first, second] = [1, 2].map(|value| table.add(value, weight));
        let used = table.take("test", first).unwrap();
        table.release("test", first).unwrap();
        let error = table.check("test", first).unwrap_err().to_string();
        assert!(error.contains("released"), "{error}");
        // It stays for the step that uses it.
        assert_eq!(*table.known(first), 1);
        assert_eq!(table.entries().count(), 2);
        drop(used);
        table.sweep();
        assert_eq!(table.entries().count(), 1);
        let third = table.add(3, weight);
        assert_eq!(third.id, 2);
        assert_eq!([*table.known(second), *table.known(third)], [2, 3]);
        let error = table.release("test", first).unwrap_err().to_string();
        assert!(error.contains("released"), "{error}");
        let error = table.check("test", weight(3)).unwrap_err().to_string();
        assert!(error.contains("another backend's"), "{error}");
    }

    #[test]
    fn a_step_of_before_a_change_is_refused() {
        let layout = LatentLayout {
            layers: 1,
            latent: 4,
            rope: 2,
            block_tokens: 8,
            blocks: 3,
            dtype: Dtype::F32,
        };
        let mut table = Table::default();
        let pool = table.add((), |id| LatentPool { id, layout });
        let used = table.take("test", pool).unwrap();
        table.check_use("test", &used).unwrap();
        table.change(pool.resized(5));
        let error = table.check("test", pool).unwrap_err().to_string();
        assert!(error.contains("before its size changed"), "{error}");
        assert!(table.check_use("test", &used).is_err());
        // Back at its size it is other memory.
        table.change(pool);
        table.check("test", pool).unwrap();
        let error = table.check_use("test", &used).unwrap_err().to_string();
        assert!(error.contains("another one since"), "{error}");
    }
}

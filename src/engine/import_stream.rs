//! The side of an import that writes: whoever has the records puts them in, and the request runs when all are there.

use super::handle::{Answer, EngineHandle, events};
use super::request::Request;
use crate::backend::block_on;
use crate::cache::{Assembler, CacheHeader, LayerRecord};
use crate::error::{EngineError, Error};

/// A request that goes on from caches which come in layer by layer. Dropping it gives back what was reserved for it.
pub struct Import {
    answer: Answer,
    assembler: Assembler,
    engine: EngineHandle,
}

impl Import {
    /// Takes a record, in any order. With the last one that is missing the request begins to run. Heads of other ranks, and
    /// what is there already, are ignored.
    ///
    /// # Errors
    /// A record that is damaged, of other caches or of another shape: nothing of it is taken, and another may still come in
    /// its place. A device that fails, or an engine that has stopped.
    pub fn put(&mut self, record: &LayerRecord) -> Result<(), Error> {
        let parts = self.assembler.put(record)?;
        if parts.is_empty() {
            return Ok(());
        }
        let (id, complete) = (self.answer.id(), self.missing() == 0);
        self.engine.ask(move |engine| {
            for part in &parts {
                engine.load_layer(id, part)?;
            }
            if complete {
                block_on(engine.start_import(id))?;
            }
            Ok(())
        })?
    }

    /// Number of KDA layers and of blocks of MLA layers that are still to come.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.assembler.missing()
    }

    /// The request's events.
    ///
    /// # Errors
    /// Caches of which something is missing: what was reserved is given back.
    pub fn finish(self) -> Result<Answer, EngineError> {
        match self.missing() {
            0 => Ok(self.answer),
            missing => Err(EngineError::ImportIncomplete { missing }),
        }
    }
}

impl EngineHandle {
    /// Reserves a slot and blocks for a request that goes on from caches which are still to come. Its prompt begins with the
    /// tokens of `header` and has one more at least.
    ///
    /// # Errors
    /// A request that cannot run, caches of another model or of other tokens, no room, or an engine that has stopped.
    pub fn import(&self, header: CacheHeader, request: Request) -> Result<Import, Error> {
        let (answer, sink) = self.open(events);
        let layout = self.reserve(answer.id(), request, header.clone(), sink)?;
        Ok(Import {
            answer,
            assembler: Assembler::new(header, layout),
            engine: self.clone(),
        })
    }
}

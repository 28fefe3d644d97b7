//! The writing side of an import: the receiver of the records writes them, and the request runs when all have come.

use std::sync::Arc;

use super::event::{Event, Sink};
use super::hand_off::HandOff;
use super::handle::{Answer, EngineHandle, events};
use super::request::{Request, RequestId};
use crate::backend::block_on;
use crate::cache::{Assembled, Assembler, CacheHeader, CacheLayout, LayerRecord};
use crate::error::{EngineError, Error};

/// Writes caches to the slot and blocks that are reserved for a request ([`Event::Reserved`]).
pub struct ImportWriter {
    id: RequestId,
    assembler: Assembler,
    engine: EngineHandle,
}

impl ImportWriter {
    /// Takes a record, in any order. Heads of other ranks and parts that came before are ignored.
    ///
    /// # Errors
    /// A record that is damaged, belongs to other caches or has another shape: no part of it is stored, and a correct copy
    /// may still follow. Also a request that was given up, a device that fails, or an engine that has stopped.
    pub fn put(&mut self, record: &LayerRecord) -> Result<(), Error> {
        self.put_all(std::slice::from_ref(record))
    }

    /// Takes several records. The engine writes what they complete between two of its steps, in one call.
    ///
    /// # Errors
    /// Those of [`ImportWriter::put`]; records before the refused one are stored.
    pub fn put_all(&mut self, records: &[LayerRecord]) -> Result<(), Error> {
        let (mut parts, mut refused) = (Vec::new(), None);
        for record in records {
            match self.assembler.put(record) {
                Ok(complete) => parts.extend(complete),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        self.load(parts)?;
        refused.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Makes the engine write complete parts.
    fn load(&self, parts: Vec<Assembled>) -> Result<(), Error> {
        if parts.is_empty() {
            return Ok(());
        }
        let id = self.id;
        self.engine.ask(move |engine| {
            parts
                .iter()
                .try_for_each(|part| engine.load_layer(id, part))
        })?
    }

    /// Number of KDA layers and of blocks of MLA layers that have not come.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.assembler.missing()
    }

    /// Starts the request, as [`Engine::start_import`](super::Engine::start_import) says.
    ///
    /// # Errors
    /// Incomplete caches, and what `start_import` refuses.
    pub fn start(self, hand_off: Option<HandOff>) -> Result<(), Error> {
        let (id, missing) = (self.id, self.missing());
        if missing > 0 {
            return Err(EngineError::ImportIncomplete { missing }.into());
        }
        self.engine
            .ask(move |engine| block_on(engine.start_import(id, hand_off.as_ref())))?
    }
}

/// A request that continues from caches which come layer by layer. Dropping it frees what was reserved for it.
pub struct Import {
    answer: Answer,
    header: CacheHeader,
    engine: EngineHandle,
    /// Set once the slot and blocks are reserved.
    writer: Option<ImportWriter>,
}

impl Import {
    /// Waits for a slot and blocks. Returns the number of leading tokens whose latents are cached here and need not be sent.
    ///
    /// # Errors
    /// A request that failed while it waited, or an engine that has stopped.
    pub fn reserved(&mut self) -> Result<usize, Arc<Error>> {
        loop {
            match self.answer.next() {
                Some(Event::Reserved { have }) => {
                    let (id, header) = (self.answer.id(), self.header.clone());
                    let writer = self.engine.import_writer(id, header, have);
                    self.writer = Some(writer.map_err(Error::from)?);
                    return Ok(have);
                }
                Some(Event::Failed(error)) => return Err(error),
                Some(Event::Finished { .. }) => {
                    return Err(Arc::new(EngineError::TransferCancelled.into()));
                }
                Some(_) => {}
                None => return Err(Arc::new(EngineError::Stopped.into())),
            }
        }
    }

    /// The writer; waits for a slot and blocks if necessary.
    fn writer(&mut self) -> Result<&mut ImportWriter, Arc<Error>> {
        if self.writer.is_none() {
            self.reserved()?;
        }
        let stopped = || Arc::new(EngineError::Stopped.into());
        self.writer.as_mut().ok_or_else(stopped)
    }

    /// Takes a record, as [`ImportWriter::put`] does, once the slot and blocks are reserved.
    ///
    /// # Errors
    /// Those of [`ImportWriter::put`] and [`Import::reserved`].
    pub fn put(&mut self, record: &LayerRecord) -> Result<(), Arc<Error>> {
        Ok(self.writer()?.put(record)?)
    }

    /// Number of KDA layers and of blocks of MLA layers that have not come, once the slot and blocks are reserved.
    ///
    /// # Errors
    /// Those of [`Import::reserved`].
    pub fn missing(&mut self) -> Result<usize, Arc<Error>> {
        Ok(self.writer()?.missing())
    }

    /// Starts the request and returns its events. Caches of a whole prompt need the `hand_off` that came with them.
    ///
    /// # Errors
    /// Those of [`ImportWriter::start`] and [`Import::reserved`]; what was reserved is freed then.
    pub fn finish(mut self, hand_off: Option<HandOff>) -> Result<Answer, Arc<Error>> {
        self.writer()?;
        if let Some(writer) = self.writer {
            writer.start(hand_off)?;
        }
        Ok(self.answer)
    }
}

impl EngineHandle {
    /// The model and tokens of a prompt's caches, as this engine computes them.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn cache_header(&self, tokens: Vec<u32>) -> Result<CacheHeader, EngineError> {
        self.ask(move |engine| engine.cache_header(tokens))
    }

    /// The formats of the model's weights, by name.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn weight_formats(&self) -> Result<String, EngineError> {
        self.ask(|engine| engine.weight_formats())
    }

    /// The pools that caches are loaded into.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn cache_layout(&self) -> Result<CacheLayout, EngineError> {
        self.ask(|engine| engine.cache_layout())
    }

    /// Submits a request that continues from caches which another engine sends. Its prompt begins with the tokens of
    /// `header`. It waits for a slot and blocks in order of arrival.
    ///
    /// # Errors
    /// A request that cannot run, caches of another model or of other tokens, or an engine that has stopped.
    pub fn import(&self, header: CacheHeader, request: Request) -> Result<Import, Arc<Error>> {
        let (answer, sink) = self.open(events);
        self.submit_import(answer.id(), request, header.clone(), sink);
        match answer.next() {
            Some(Event::Failed(error)) => Err(error),
            None => Err(Arc::new(EngineError::Stopped.into())),
            Some(_) => Ok(Import {
                answer,
                header,
                engine: self.clone(),
                writer: None,
            }),
        }
    }

    /// The same, with a sink for the events. After [`Event::Reserved`], [`EngineHandle::import_writer`] takes the records. A
    /// request that cannot run fails with an event.
    pub fn import_to(&self, header: CacheHeader, request: Request, sink: Sink) -> RequestId {
        let id = self.next_id();
        self.submit_import(id, request, header, sink);
        id
    }

    /// The writer for the records of a request that has its slot and blocks, and the latents of the first `have` tokens.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn import_writer(
        &self,
        id: RequestId,
        header: CacheHeader,
        have: usize,
    ) -> Result<ImportWriter, EngineError> {
        let layout = self.cache_layout()?;
        Ok(ImportWriter {
            id,
            assembler: Assembler::new(header, layout).with_latents(have),
            engine: self.clone(),
        })
    }

    /// Ends an import with the reason why its caches do not come.
    ///
    /// # Errors
    /// A request that is not a waiting import, or an engine that has stopped.
    pub fn fail_import(&self, id: RequestId, error: Error) -> Result<(), EngineError> {
        self.ask(move |engine| engine.fail_import(id, error))?
    }

    /// Gives up an import: the request prefills its prompt here.
    ///
    /// # Errors
    /// A request that is not a waiting import, or an engine that has stopped.
    pub fn recompute_import(&self, id: RequestId) -> Result<(), EngineError> {
        self.ask(move |engine| engine.recompute_import(id))?
    }
}

//! A replica's program as its devices run it: each operation with the devices of its layer's home.
//!
//! Where several devices have the routed experts of a layer, each computes the rows of its own; the home's device adds them in the
//! router's order, so that a sum has the bits of a whole layer. The shared experts run while other devices compute.
//!
//! A trace of all layers is one tensor, of which each layer's operation writes its part. Layers may be on different devices, and a
//! layer's pool is one of a single layer, so that each operation gets a tensor of its own (a *piece*); probes and reads put the
//! pieces together.

use super::NAME;
use super::tables::Tables;
use crate::backend::parts::cut::{
    Exchange, ExpertExchange, Item, Parts, Placed, cut, divided_experts,
};
use crate::backend::trace::{TraceGate, TraceKda, TraceRoute};
use crate::backend::{
    Element, Experts, LayerHome, MoeBlock, Op, Operands, Pool, Program, Result, Rows, Tensor,
    Weight,
};
use crate::error::BackendError;

/// Tensors that a replica adds to those of the model. They are kept: programs that are compiled later use them again.
#[derive(Default)]
pub(super) struct Extra {
    /// For the rows of routed experts, `[T, top_k * d]`.
    rows: Vec<Tensor>,
    /// Pieces of traces.
    pub(super) pieces: Vec<Piece>,
}

/// A layer's part of a trace.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    /// The trace of all layers.
    pub(super) whole: Tensor,
    /// The first of the piece's columns in it.
    pub(super) column: usize,
    pub(super) tensor: Tensor,
}

/// A program in parts.
pub(super) struct Lowered {
    pub(super) parts: Parts,
    /// For each probe of the program the first column of each of its pieces, whose probes follow it.
    pub(super) probes: Vec<Vec<usize>>,
}

/// Cuts a program that was checked.
///
/// # Errors
/// Experts whose weights are divided in different ways.
pub(super) fn lower(
    program: &Program,
    homes: &[LayerHome],
    own: usize,
    tables: &mut Tables,
    extra: &mut Extra,
) -> Result<Lowered> {
    let layers = layers_of(program, tables)?;
    let mut lowering = Lowering {
        tables,
        extra,
        items: Vec::new(),
        written: Vec::new(),
        probes: Vec::new(),
    };
    let own = LayerHome::whole(own);
    for (op, layer) in program.ops.iter().zip(layers) {
        let home = layer.map_or(&own, |layer| &homes[layer]);
        lowering.op(op, home)?;
    }
    Ok(Lowered {
        probes: lowering.probes,
        parts: cut(lowering.items),
    })
}

/// The layer of each operation: that of its weights or its pool, else that of the operation before it, or of the first one that has
/// any.
fn layers_of(program: &Program, tables: &Tables) -> Result<Vec<Option<usize>>> {
    let layers = program.ops.iter().map(|op| layer_of(op, tables));
    let mut layers = layers.collect::<Result<Vec<_>>>()?;
    let mut last = layers.iter().find_map(|layer| *layer);
    for layer in &mut layers {
        last = layer.or(last);
        *layer = last;
    }
    Ok(layers)
}

fn layer_of(op: &Op, tables: &Tables) -> Result<Option<usize>> {
    for part in op.parts().into_iter().flatten() {
        if let Some(layer) = layer_of(&part, tables)? {
            return Ok(Some(layer));
        }
    }
    let Operands { weights, pool, .. } = op.operands();
    if let Some(weight) = weights.first() {
        return Ok(Some(tables.weights.get(NAME, *weight)?.layer));
    }
    Ok(match pool {
        Some((Pool::States(pool), layer)) => {
            Some(tables.states.get(NAME, pool)?.layers[layer].layer)
        }
        Some((Pool::Latents(pool), layer)) => {
            Some(tables.latents.get(NAME, pool)?.layers[layer].layer)
        }
        None => None,
    })
}

struct Lowering<'a> {
    tables: &'a mut Tables,
    extra: &'a mut Extra,
    items: Vec<Placed>,
    /// Tensors that were written so far, each with the device that did last.
    written: Vec<(Tensor, usize)>,
    probes: Vec<Vec<usize>>,
}

impl Lowering<'_> {
    fn op(&mut self, op: &Op, home: &LayerHome) -> Result<()> {
        let device = home.device;
        match op {
            Op::MoeBlock(block) if self.is_divided([block.gate, block.up, block.down])? => {
                self.block(block, home);
            }
            Op::Experts(experts)
                if self.is_divided([experts.gate, experts.up, experts.down])? =>
            {
                let rows = self.rows(experts);
                let [rows, exchange, combine] = divided_experts(experts, rows);
                self.push(rows, &home.experts, device);
                self.push(exchange, &home.experts, device);
                self.push(combine, &[device], device);
            }
            Op::ExpertRows(op) if self.is_divided([op.gate, op.up, op.down])? => {
                let exchange = Exchange::Experts(ExpertExchange {
                    experts: op.experts,
                    rows: op.output,
                    count: op.gate.stack,
                });
                self.push(Item::of(*op), &home.experts, device);
                self.push(Item::Exchange(exchange), &home.experts, device);
            }
            Op::TraceKda(op) => {
                let output = self.piece(op.output, op.layer, op.pool.layout.layers);
                self.on(TraceKda { output, ..*op }, device);
            }
            Op::TraceGate(op) => {
                let output = self.piece(op.output, op.layer, op.layout.layers);
                let mut piece = TraceGate { output, ..*op };
                (piece.layout.layers, piece.layer) = (1, 0);
                self.on(piece, device);
            }
            Op::TraceRoute(op) => {
                let output = self.piece(op.output, op.layer, op.layers);
                let (layer, layers) = (0, 1);
                let piece = TraceRoute {
                    output,
                    layer,
                    layers,
                    ..*op
                };
                self.on(piece, device);
            }
            Op::Probe(tensor) => self.probe(*tensor, device),
            Op::ProbePositions(tensor) => {
                self.probes.push(Vec::new());
                self.on(op.clone(), self.holder(*tensor, device));
            }
            op => self.on(op.clone(), device),
        }
        Ok(())
    }

    /// A probe of a tensor, and of the pieces of it that this program writes.
    fn probe(&mut self, whole: Tensor, device: usize) {
        self.on(Op::Probe(whole), self.holder(whole, device));
        let pieces = self.extra.pieces.iter();
        let pieces = pieces.filter(|piece| piece.whole == whole);
        let written = pieces.filter(|piece| {
            let mut written = self.written.iter();
            written.any(|(tensor, _)| *tensor == piece.tensor)
        });
        let written: Vec<Piece> = written.copied().collect();
        for piece in &written {
            let tensor = piece.tensor;
            self.on(Op::Probe(tensor), self.holder(tensor, device));
        }
        let columns = written.iter().map(|piece| piece.column);
        self.probes.push(columns.collect());
    }

    /// An operation of a single device.
    fn on(&mut self, op: impl Into<Op>, device: usize) {
        self.push(Item::of(op), &[device], device);
    }

    /// An item of these devices, the results of which are on `device`.
    fn push(&mut self, item: Item, ranks: &[usize], device: usize) {
        let mut written = Vec::new();
        match &item {
            Item::Op(op) => writes(op, &mut written),
            Item::Exchange(exchange) => written.push(exchange.tensors().1),
        }
        for tensor in written {
            match self.written.iter_mut().find(|(known, _)| *known == tensor) {
                Some((_, on)) => *on = device,
                None => self.written.push((tensor, device)),
            }
        }
        self.items.push(Placed {
            item,
            ranks: ranks.to_vec(),
            to: vec![device],
        });
    }

    /// The device that wrote a tensor last, if this program did; else `device`.
    fn holder(&self, tensor: Tensor, device: usize) -> usize {
        let mut written = self.written.iter();
        let found = written.find(|(known, _)| *known == tensor);
        found.map_or(device, |(_, on)| *on)
    }

    /// Router, routed experts on several devices, shared experts.
    fn block(&mut self, block: &MoeBlock, home: &LayerHome) {
        let device = home.device;
        let experts = block.experts();
        let rows = self.rows(&experts);
        let [rows, exchange, combine] = divided_experts(&experts, rows);
        self.on(block.route, device);
        self.push(rows, &home.experts, device);
        if let Some(shared) = block.shared {
            self.on(shared, device);
        }
        self.push(exchange, &home.experts, device);
        self.push(combine, &[device], device);
        // The sum with the shared experts.
        for op in block.ops().into_iter().skip(3) {
            self.on(op, device);
        }
    }

    /// Whether several devices have a part of routed experts each.
    fn is_divided(&self, weights: [Weight; 3]) -> Result<bool> {
        let mut divided = 0;
        for weight in weights {
            divided += usize::from(self.tables.is_divided(weight)?);
        }
        match divided {
            0 => Ok(false),
            3 => Ok(true),
            _ => Err(refused("experts of which devices have different parts")),
        }
    }

    /// The tensor for the rows of routed experts: `[T, top_k * d]`, f32.
    fn rows(&mut self, experts: &Experts) -> Tensor {
        let capacity = experts.output.capacity;
        let width = experts.experts.width * experts.output.width;
        let known = self.extra.rows.iter();
        let mut known = known.filter(|it| it.capacity == capacity && it.width == width);
        if let Some(tensor) = known.next() {
            return *tensor;
        }
        let tensor = self.make(Rows::Tokens, capacity, width);
        self.extra.rows.push(tensor);
        tensor
    }

    /// The piece of a trace of `layers` layers that belongs to one of them.
    fn piece(&mut self, whole: Tensor, layer: usize, layers: usize) -> Tensor {
        let width = whole.width / layers.max(1);
        let column = layer * width;
        let mut known = self.extra.pieces.iter();
        let known = known.find(|it| (it.whole, it.column) == (whole, column));
        if let Some(piece) = known {
            return piece.tensor;
        }
        let tensor = self.make(whole.rows, whole.capacity, width);
        self.extra.pieces.push(Piece {
            whole,
            column,
            tensor,
        });
        tensor
    }

    /// A tensor that devices get when a program of theirs uses it.
    fn make(&mut self, rows: Rows, capacity: usize, width: usize) -> Tensor {
        super::plan(self.tables, (rows, capacity, width, Element::F32))
    }
}

/// Adds the tensors that an operation writes, with those inside of a block.
fn writes(op: &Op, written: &mut Vec<Tensor>) {
    match op.parts() {
        Some(parts) => parts.iter().for_each(|part| writes(part, written)),
        None => written.extend(op.operands().writes),
    }
}

fn refused(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: NAME,
        what: what.to_owned(),
    }
}

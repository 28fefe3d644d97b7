//! A recurrence planned on a device, with every slot poisoned; everything that a call may or may not change is read back.

use std::ops::Range;

use super::kda_input::KdaCase;
use crate::backend::{
    Batch, Capacity, Element, Form, KdaRecurrence, Orientation, Program, Result, Rows, Segment,
    Slot, StateLayout, StatePool, StateRecord, Step, Tensor,
};
use crate::conformance::CaseContext;

/// Layers of the pools in these cases, and the one that is used.
pub(super) const LAYERS: usize = 2;
pub(super) const LAYER: usize = 1;

/// A recurrence planned on a device: its pool, tensors and step.
pub(super) struct Fixture {
    pub(super) pool: StatePool,
    case: KdaCase,
    inputs: [Tensor; 3],
    output: Tensor,
    step: Box<dyn Step>,
}

impl Fixture {
    /// Plans the recurrence for batches of at most `segments` segments and as many checkpoints, with all slots poisoned.
    pub(super) fn new(
        ctx: &mut CaseContext<'_>,
        case: &KdaCase,
        form: Form,
        segments: usize,
        slots: usize,
    ) -> Result<Self> {
        let layout = case.layout(slots);
        let pool = ctx.backend.state_pool(layout)?;
        let tokens = case.tokens();
        let qkv = ctx.output(tokens, layout.channels())?;
        let mut plan = |width| ctx.blank(Rows::Tokens, tokens, width, Element::F32);
        let gates = plan(layout.value_heads * layout.key_width)?;
        let beta = plan(layout.value_heads)?;
        let output = ctx.output(tokens, layout.value_heads * layout.value_width)?;
        let capacity = Capacity {
            tokens: tokens + 1,
            segments,
            outputs: 0,
            blocks: 0,
            checkpoints: segments,
        };
        let recurrence = KdaRecurrence {
            qkv,
            gates,
            beta,
            pool,
            layer: LAYER,
            form,
            output,
        };
        let step = ctx
            .backend
            .compile(&Program::from_iter([recurrence]), capacity)?;
        let mut case = case.clone();
        let rounded = ctx.rounded(case.qkv.clone());
        if rounded != case.qkv {
            // Results from a file are for the unrounded inputs: a device that rounds those is compared with the definition on
            // the rounded ones, as in every other case.
            (case.qkv, case.expected) = (rounded, None);
        }
        let fixture = Self {
            pool,
            case,
            inputs: [qkv, gates, beta],
            output,
            step,
        };
        fixture.poison(ctx)?;
        Ok(fixture)
    }

    /// Fills every slot of every layer with NaN.
    pub(super) fn poison(&self, ctx: &mut CaseContext<'_>) -> Result<()> {
        let state = vec![f32::NAN; self.pool.layout.state_len()];
        let conv_state = vec![f32::NAN; self.pool.layout.conv_state_len()];
        for (layer, slot) in self.places() {
            let record = record(&self.pool.layout, &state, &conv_state);
            ctx.backend.write_state(&self.pool, layer, slot, &record)?;
        }
        Ok(())
    }

    fn places(&self) -> impl Iterator<Item = (usize, Slot)> + use<> {
        let slots = self.pool.layout.slots as u32;
        (0..LAYERS).flat_map(move |layer| (0..slots).map(move |slot| (layer, Slot(slot))))
    }

    /// Writes a state, with a poisoned convolution state.
    pub(super) fn write(&self, ctx: &mut CaseContext<'_>, slot: Slot, state: &[f32]) -> Result<()> {
        let conv_state = vec![f32::NAN; self.pool.layout.conv_state_len()];
        let record = record(&self.pool.layout, state, &conv_state);
        ctx.backend.write_state(&self.pool, LAYER, slot, &record)
    }

    /// Writes the initial state of a sequence to `slot`; returns `None` if it starts from zero.
    pub(super) fn seed(
        &self,
        ctx: &mut CaseContext<'_>,
        sequence: usize,
        slot: Slot,
    ) -> Result<Option<Slot>> {
        let Some(state) = self.case.start(sequence).map(<[f32]>::to_vec) else {
            return Ok(None);
        };
        self.write(ctx, slot, &state)?;
        Ok(Some(slot))
    }

    /// Reads a state as `[value_heads, K, V]`.
    pub(super) fn state(&self, ctx: &mut CaseContext<'_>, slot: Slot) -> Result<Vec<f32>> {
        let record = ctx.backend.read_state(&self.pool, LAYER, slot).wait()?;
        Ok(record.key_value().into_owned())
    }

    /// All states of the pool.
    pub(super) fn snapshot(&self, ctx: &mut CaseContext<'_>) -> Result<Vec<StateRecord>> {
        self.places()
            .map(|(layer, slot)| ctx.backend.read_state(&self.pool, layer, slot).wait())
            .collect()
    }

    /// Compares the pool with an earlier snapshot, except the states in `written`.
    pub(super) fn untouched(
        &self,
        ctx: &mut CaseContext<'_>,
        before: &[StateRecord],
        written: &[Slot],
    ) -> Result<()> {
        let after = self.snapshot(ctx)?;
        for ((layer, slot), (before, after)) in self.places().zip(before.iter().zip(&after)) {
            if layer != LAYER || !written.contains(&slot) {
                let what = format!("the state in slot {} of layer {layer}, not named", slot.0);
                ctx.same(what, &after.state, &before.state);
            }
            let what = format!("the convolution state in slot {} of layer {layer}", slot.0);
            ctx.same(what, &after.conv_state, &before.conv_state);
        }
        Ok(())
    }

    /// Runs the rows `ranges`, concatenated, as these segments; returns the outputs `[rows, value_heads * V]`.
    pub(super) fn run(
        &mut self,
        ctx: &mut CaseContext<'_>,
        ranges: &[Range<usize>],
        segments: Vec<Segment>,
    ) -> Result<Vec<f32>> {
        let [qkv, gates, beta] = self.inputs;
        for (tensor, values) in [
            (qkv, &self.case.qkv),
            (gates, &self.case.gates),
            (beta, &self.case.beta),
        ] {
            let rows: Vec<f32> = ranges
                .iter()
                .flat_map(|range| &values[range.start * tensor.width..range.end * tensor.width])
                .copied()
                .collect();
            ctx.fill(tensor, &rows)?;
        }
        ctx.poison(self.output)?;
        let tokens = ranges.iter().map(Range::len).sum();
        let batch = Batch {
            tokens: vec![0; tokens],
            segments,
            outputs: Vec::new(),
            draws: Vec::new(),
            fed: Vec::new(),
        };
        ctx.submit(&mut *self.step, &batch)?;
        ctx.read(self.output, tokens)
    }

    /// The same with a single segment.
    pub(super) fn run_one(
        &mut self,
        ctx: &mut CaseContext<'_>,
        range: Range<usize>,
        segment: Segment,
    ) -> Result<Vec<f32>> {
        self.run(ctx, std::slice::from_ref(&range), vec![segment])
    }

    /// The inputs, rounded to the device's dtype.
    pub(super) fn case(&self) -> &KdaCase {
        &self.case
    }
}

/// A segment of a sequence's recurrence.
pub(super) fn segment(length: usize, slot_in: Option<Slot>, slot_out: Slot) -> Segment {
    Segment {
        length,
        position: 0,
        slot_in,
        slot_out,
        checkpoints: Vec::new(),
        blocks: Vec::new(),
    }
}

/// One layer of one slot, in the layout `[value_heads, K, V]`.
pub(super) fn record(layout: &StateLayout, state: &[f32], conv_state: &[f32]) -> StateRecord {
    StateRecord {
        orientation: Orientation::KeyValue,
        heads: layout.value_heads,
        key_width: layout.key_width,
        value_width: layout.value_width,
        state: state.to_vec(),
        channels: layout.channels(),
        conv_state: conv_state.to_vec(),
    }
}

//! `short_conv`: the convolution, and the tails that carry it from one piece to the next.

use super::kda_rig::{LAYER, piece, record};
use crate::backend::{
    Batch, Capacity, Element, Piece, Program, Result, ShortConv, Slot, StateCheckpoint,
    StateLayout, StatePool, Step, Tensor,
};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, widen};
use crate::conformance::{Case, Lab, Matrix, Tolerance};

/// Heads of keys and values, K, V and taps.
pub(super) type Shape = [usize; 5];

/// A convolution planned on a device, with the inputs of all its rows.
struct Rig {
    pool: StatePool,
    weight: Matrix,
    values: Vec<f32>,
    input: Tensor,
    output: Tensor,
    step: Box<dyn Step>,
}

impl Rig {
    /// Plans it for `tokens` tokens, with every slot poisoned.
    fn new(
        lab: &mut Lab<'_>,
        format: Format,
        shape: Shape,
        tokens: usize,
        slots: usize,
    ) -> Result<Self> {
        let [key_heads, value_heads, key_width, value_width, taps] = shape;
        let layout = StateLayout {
            layers: 2,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps,
            slots,
        };
        let pool = lab.backend.state_pool(layout)?;
        let channels = layout.channels();
        let weight = lab.random_matrix(format, [1, channels, taps], 0.5)?;
        let values = lab.activations(tokens * channels, 1.0);
        let input = lab.blank(
            crate::backend::Rows::Tokens,
            tokens,
            channels,
            Element::Activation,
        )?;
        let output = lab.output(tokens, channels)?;
        let capacity = Capacity {
            tokens: tokens + 1,
            pieces: slots,
            outputs: 0,
            blocks: 0,
            checkpoints: slots,
        };
        let conv = ShortConv {
            input,
            weight: weight.weight,
            pool,
            layer: LAYER,
            output,
        };
        let step = lab.backend.compile(&Program::from_iter([conv]), capacity)?;
        let rig = Self {
            pool,
            weight,
            values,
            input,
            output,
            step,
        };
        for layer in 0..layout.layers {
            for slot in 0..slots {
                rig.write(
                    lab,
                    layer,
                    Slot(slot as u32),
                    &vec![f32::NAN; layout.tail_len()],
                )?;
            }
        }
        Ok(rig)
    }

    /// Writes a tail, with a state that must not change.
    fn write(&self, lab: &mut Lab<'_>, layer: usize, slot: Slot, tail: &[f32]) -> Result<()> {
        let state = vec![f32::NAN; self.pool.layout.state_len()];
        let record = record(&self.pool.layout, &state, tail);
        lab.backend.write_state(&self.pool, layer, slot, &record)
    }

    fn tail(&self, lab: &mut Lab<'_>, layer: usize, slot: Slot) -> Result<Vec<f32>> {
        let record = lab.backend.read_state(&self.pool, layer, slot).wait()?;
        lab.holds(
            format!("the state in slot {} of layer {layer} is as it was", slot.0),
            record.state.iter().all(|value| value.is_nan()),
        );
        Ok(record.tail)
    }

    /// Runs rows from `first` on as these pieces.
    fn run(&mut self, lab: &mut Lab<'_>, first: usize, pieces: &[Piece]) -> Result<Vec<f32>> {
        let tokens: usize = pieces.iter().map(|piece| piece.length).sum();
        let width = self.input.width;
        lab.fill(
            self.input,
            &self.values[first * width..(first + tokens) * width],
        )?;
        lab.poison(self.output)?;
        let batch = Batch {
            tokens: vec![0; tokens],
            pieces: pieces.to_vec(),
            outputs: Vec::new(),
        };
        lab.submit(&mut *self.step, &batch)?;
        lab.read(self.output, tokens)
    }
}

/// A ragged batch, with checkpoints inside its pieces.
pub(super) fn against_definition(
    lab: &mut Lab<'_>,
    format: Format,
    shape: Shape,
    lengths: &[usize],
    seeded: bool,
) -> Result<()> {
    let tokens = lengths.iter().sum();
    let wanted = [1, 2, 3, 5, 33];
    let slots = lengths.len() * (2 + wanted.len()) + 1;
    let mut rig = Rig::new(lab, format, shape, tokens, slots)?;
    let mut free = (0..slots as u32).rev().map(Slot);
    let mut next = || free.next().unwrap_or(Slot(0));
    let (mut pieces, mut tails) = (Vec::new(), Vec::new());
    let len = rig.pool.layout.tail_len();
    for (i, length) in lengths.iter().enumerate() {
        let tail = if seeded {
            lab.activations(len, 1.0)
        } else {
            vec![0.0; len]
        };
        let slot = next();
        let slot_in = seeded.then_some(slot);
        if seeded {
            rig.write(lab, LAYER, slot, &tail)?;
        }
        let slot_out = if i % 2 == 0 { slot } else { next() };
        let mut piece = piece(*length, slot_in, slot_out);
        for after in wanted.into_iter().filter(|after| after <= length) {
            let slot = next();
            piece.checkpoints.push(StateCheckpoint { after, slot });
        }
        pieces.push(piece);
        tails.push(tail);
    }
    let mut before = Vec::new();
    for layer in 0..2 {
        for slot in 0..if lab.timed() { 0 } else { slots as u32 } {
            before.push(rig.tail(lab, layer, Slot(slot))?);
        }
    }
    let output = rig.run(lab, 0, &pieces)?;
    if lab.timed() {
        return Ok(());
    }
    let channels = rig.input.width;
    let mut written = Vec::new();
    let mut row = 0;
    for (i, piece) in pieces.iter().enumerate() {
        let rows = row * channels..(row + piece.length) * channels;
        row += piece.length;
        let (answer, ends) = oracle::short_conv(
            &widen(&rig.values[rows.clone()]),
            &rig.weight.values,
            channels,
            &widen(&tails[i]),
        );
        lab.close(
            format!("outputs of sequence {i}"),
            channels,
            &output[rows],
            &answer,
        );
        let ends_at = piece.checkpoints.iter().map(|kept| (kept.after, kept.slot));
        for (after, slot) in ends_at.chain([(piece.length, piece.slot_out)]) {
            let found = rig.tail(lab, LAYER, slot)?;
            let what = format!("the tail of sequence {i} after {after} tokens");
            let width = found.len();
            lab.close_to(what, width, &found, &ends[after], Tolerance::Exact);
            written.push(slot);
        }
    }
    for (place, before) in before.iter().enumerate() {
        let (layer, slot) = (place / slots, Slot((place % slots) as u32));
        if layer != LAYER || !written.contains(&slot) {
            let after = rig.tail(lab, layer, slot)?;
            let what = format!("the tail in slot {} of layer {layer}, not named", slot.0);
            lab.same(what, &after, before);
        }
    }
    Ok(())
}

/// A prompt cut in two gives what it gives in one call, and so does one resumed from a checkpoint.
fn cut(lab: &mut Lab<'_>, shape: Shape, length: usize) -> Result<()> {
    let mut rig = Rig::new(lab, Format::Bf16, shape, length, 4)?;
    let whole = rig.run(lab, 0, &[piece(length, None, Slot(0))])?;
    let end = rig.tail(lab, LAYER, Slot(0))?;
    let width = rig.input.width;
    for cut in 0..=length {
        let mut output = rig.run(lab, 0, &[piece(cut, None, Slot(1))])?;
        let middle = rig.tail(lab, LAYER, Slot(1))?;
        output.extend(rig.run(lab, cut, &[piece(length - cut, Some(Slot(1)), Slot(2))])?);
        let what = format!("outputs, cut after {cut}");
        lab.close_to(what, width, &output, &widen(&whole), Tolerance::Split);
        let found = rig.tail(lab, LAYER, Slot(2))?;
        lab.same(format!("the tail, cut after {cut}"), &found, &end);
        if cut == 0 {
            continue;
        }
        let mut marked = piece(length, None, Slot(2));
        marked.checkpoints.push(StateCheckpoint {
            after: cut,
            slot: Slot(3),
        });
        rig.run(lab, 0, &[marked])?;
        let kept = rig.tail(lab, LAYER, Slot(3))?;
        lab.same(format!("the tail kept after {cut}"), &kept, &middle);
        let rest = rig.run(lab, cut, &[piece(length - cut, Some(Slot(3)), Slot(2))])?;
        let what = format!("resumed after {cut}");
        lab.same_in_f32(what, width, &rest, &whole[cut * width..]);
    }
    Ok(())
}

/// Each sequence of a ragged batch has the bits that it has alone, and has them again each time.
fn alone(lab: &mut Lab<'_>) -> Result<()> {
    let lengths = [1, 33, 0, 2, 7, 1];
    let mut rig = Rig::new(lab, Format::Bf16, [2, 2, 24, 20, 4], 44, 2 * lengths.len())?;
    let mut pieces = Vec::new();
    for (i, length) in lengths.into_iter().enumerate() {
        let tail = lab.activations(rig.pool.layout.tail_len(), 1.0);
        rig.write(lab, LAYER, Slot(i as u32), &tail)?;
        let slot_out = Slot((lengths.len() + i) as u32);
        pieces.push(piece(length, Some(Slot(i as u32)), slot_out));
    }
    let together = rig.run(lab, 0, &pieces)?;
    for time in 2..=lab.repeats {
        let next = rig.run(lab, 0, &pieces)?;
        lab.same(format!("outputs of call {time}"), &next, &together);
    }
    let (mut first, width) = (0, rig.input.width);
    for (i, piece) in pieces.iter().enumerate() {
        let tail = rig.tail(lab, LAYER, piece.slot_out)?;
        let output = rig.run(lab, first, std::slice::from_ref(piece))?;
        let rows = first * width..(first + piece.length) * width;
        let what = format!("outputs of sequence {i}");
        lab.same_in_f32(what, width, &output, &together[rows]);
        let single = rig.tail(lab, LAYER, piece.slot_out)?;
        lab.same(format!("the tail of sequence {i}"), &single, &tail);
        first += piece.length;
    }
    Ok(())
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, body: Body| {
        cases.push(Case::new("short_conv", name, Tolerance::Close, body));
    };
    for (shape, format) in [
        ([1, 1, 128, 128, 4], Format::Bf16),
        ([3, 3, 32, 32, 4], Format::F16),
        ([2, 4, 20, 33, 4], Format::F32),
        ([1, 2, 16, 25, 3], Format::Bf16),
        ([1, 1, 8, 8, 2], Format::F32),
    ] {
        let [hk, hv, k, v, taps] = shape;
        for lengths in [
            &[1_usize, 33, 0, 100, 7][..],
            &[2],
            &[3],
            &[4, 5, 16, 17],
            &[1, 1, 1],
            &[0, 0],
        ] {
            for seeded in [true, false] {
                let start = if seeded { "seeded" } else { "from zero" };
                let name =
                    format!("{format}/H={hk},{hv} K={k} V={v} taps={taps}/{lengths:?}/{start}");
                add(
                    name,
                    Box::new(move |lab| against_definition(lab, format, shape, lengths, seeded)),
                );
            }
        }
    }
    add(
        "cut everywhere/T=21".to_owned(),
        Box::new(|lab| cut(lab, [1, 1, 33, 20, 4], 21)),
    );
    add("ragged is alone".to_owned(), Box::new(alone));
    cases
}

type Body = Box<dyn Fn(&mut Lab<'_>) -> Result<()> + Send + Sync>;

//! `kda_chunk`, `kda_step` and `kda_recurrence` (whichever form suits) against the definition.
//!
//! Every run also looks at what it must leave alone: all convolution tails, the other layer, the slots not named.

use std::ops::Range;

use crate::backend::{
    Batch, Element, Form, KdaRecurrence, Orientation, Piece, Result, Slot, StateLayout, StatePool,
    StateRecord, Step, Tensor,
};
use crate::conformance::oracle::{Recurrence, widen};
use crate::conformance::{Case, Gates, Lab, Random, Tolerance};

/// Layers of the pools below, and the one that is used.
const LAYERS: usize = 2;
pub(super) const LAYER: usize = 1;

/// Lengths that find bugs (`spec/kda.md`, section 5): around chunks, warps and workgroups.
const LENGTHS: [usize; 17] = [
    0, 1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 127, 128, 130, 200, 256, 513,
];

/// The shape of a recurrence: key heads, value heads, K, V.
pub(super) type Shape = [usize; 4];

/// Inputs of one recurrence over a ragged batch, and the answers where they are known.
#[derive(Clone, Debug)]
pub struct KdaCase {
    /// Heads of queries and keys, heads of values, K and V.
    pub shape: [usize; 4],
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// `[T, channels]`: queries, keys, values, side by side.
    pub qkv: Vec<f32>,
    /// `[T, value_heads * K]`: log decay.
    pub gates: Vec<f32>,
    /// `[T, value_heads]`.
    pub beta: Vec<f32>,
    /// `[sequences, value_heads, K, V]`; nothing where sequences start from zero.
    pub initial: Option<Vec<f32>>,
    /// The answers; nothing where the oracle gives them.
    pub expected: Option<KdaExpected>,
}

/// What a recurrence must come to.
#[derive(Clone, Debug)]
pub struct KdaExpected {
    /// `[T, value_heads * V]`.
    pub output: Vec<f64>,
    /// `[sequences, value_heads, K, V]`.
    pub states: Vec<f64>,
}

impl KdaCase {
    /// Random inputs.
    pub(super) fn random(
        random: &mut Random,
        shape: Shape,
        lengths: &[usize],
        gates: Gates,
        seeded: bool,
    ) -> Self {
        let [_, value_heads, k, v] = shape;
        let tokens = lengths.iter().sum();
        let mut case = Self {
            shape,
            lengths: lengths.to_vec(),
            qkv: Vec::new(),
            gates: random.gates(gates, tokens, value_heads, k),
            beta: (0..tokens * value_heads)
                .map(|_| random.uniform())
                .collect(),
            initial: None,
            expected: None,
        };
        case.qkv = random.normals(tokens * case.layout(0).channels(), 1.0);
        if seeded {
            case.initial = Some(random.normals(lengths.len() * value_heads * k * v, 0.3));
        }
        case
    }

    /// Makes all keys of a head nearly the same one and writes strong: `(I + A)^-1` is ill-conditioned.
    pub(super) fn repeated(mut self, random: &mut Random) -> Self {
        let [key_heads, _, k, _] = self.shape;
        let channels = self.layout(0).channels();
        let keys = key_heads * k..2 * key_heads * k;
        let first: Vec<f32> = self.qkv.get(keys.clone()).unwrap_or(&[]).to_vec();
        for row in self.qkv.chunks_exact_mut(channels) {
            for (key, first) in row[keys.clone()].iter_mut().zip(&first) {
                *key = first + 0.01 * *key;
            }
        }
        for beta in &mut self.beta {
            *beta = 0.85 + 0.14 * random.uniform();
        }
        self
    }

    /// Scales queries and keys, so that the epsilon of their norm shows.
    pub(super) fn scaled(mut self, scale: f32) -> Self {
        let [key_heads, _, k, _] = self.shape;
        let channels = self.layout(0).channels();
        for row in self.qkv.chunks_exact_mut(channels) {
            row[..2 * key_heads * k]
                .iter_mut()
                .for_each(|x| *x *= scale);
        }
        self
    }

    /// The pool's shape with so many slots.
    pub(super) fn layout(&self, slots: usize) -> StateLayout {
        let [key_heads, value_heads, key_width, value_width] = self.shape;
        StateLayout {
            layers: LAYERS,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps: 4,
            slots,
        }
    }

    pub(super) fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The initial state of a sequence, if it has one.
    pub(super) fn start(&self, sequence: usize) -> Option<&[f32]> {
        let len = self.layout(0).state_len();
        self.initial
            .as_ref()
            .map(|states| &states[sequence * len..(sequence + 1) * len])
    }

    /// The rows of a sequence.
    pub(super) fn rows(&self, sequence: usize) -> Range<usize> {
        let start = self.lengths[..sequence].iter().sum();
        start..start + self.lengths[sequence]
    }

    /// The oracle's outputs and final states.
    pub(super) fn answers(&self) -> KdaExpected {
        if let Some(expected) = &self.expected {
            return expected.clone();
        }
        let [key_heads, value_heads, key_width, value_width] = self.shape;
        let layout = self.layout(0);
        let (mut output, mut states) = (Vec::new(), Vec::new());
        for sequence in 0..self.lengths.len() {
            let mut recurrence = Recurrence {
                key_heads,
                value_heads,
                key_width,
                value_width,
                state: self
                    .start(sequence)
                    .map_or_else(|| vec![0.0; layout.state_len()], widen),
            };
            let rows = self.rows(sequence);
            let of =
                |values: &[f32], width: usize| widen(&values[rows.start * width..rows.end * width]);
            output.extend(recurrence.tokens(
                &of(&self.qkv, layout.channels()),
                &of(&self.gates, value_heads * key_width),
                &of(&self.beta, value_heads),
            ));
            states.extend(recurrence.state);
        }
        KdaExpected { output, states }
    }

    /// Bytes and FLOPs of one run: every input, output and state once (`spec/kda.md`, section 3).
    pub(super) fn work(&self, form: Form) -> (usize, usize) {
        let (layout, tokens) = (self.layout(0), self.tokens());
        let row = layout.channels() + layout.value_heads * (layout.key_width + layout.value_width);
        let states = 2 * self.lengths.len() * layout.state_len();
        // A decay, an answer, a write and a read of the state a token; by chunks the decay is shared.
        let (k, v) = (layout.key_width, layout.value_width);
        let token = match form {
            Form::Step => 7 * k * v,
            Form::Auto | Form::Chunk => 6 * k * v + 8 * 16 * k,
        };
        let flops = tokens * layout.value_heads * token;
        (4 * (tokens * row + states), flops)
    }
}

/// A recurrence planned on a device: its pool, tensors and step.
pub(super) struct Rig {
    pub(super) pool: StatePool,
    case: KdaCase,
    inputs: [Tensor; 3],
    output: Tensor,
    step: Box<dyn Step>,
}

impl Rig {
    /// Plans the recurrence for batches of at most `pieces` pieces and as many checkpoints, with all slots poisoned.
    pub(super) fn new(
        lab: &mut Lab<'_>,
        case: &KdaCase,
        form: Form,
        pieces: usize,
        slots: usize,
    ) -> Result<Self> {
        let layout = case.layout(slots);
        let pool = lab.backend.state_pool(layout)?;
        let tokens = case.tokens();
        let qkv = lab.output(tokens, layout.channels())?;
        let mut plan = |width| lab.blank(crate::backend::Rows::Tokens, tokens, width, Element::F32);
        let gates = plan(layout.value_heads * layout.key_width)?;
        let beta = plan(layout.value_heads)?;
        let output = lab.output(tokens, layout.value_heads * layout.value_width)?;
        let mut step = lab.backend.step(crate::backend::Capacity {
            tokens: tokens + 1,
            pieces,
            outputs: 0,
            blocks: 0,
            checkpoints: pieces,
        })?;
        step.kda_recurrence(KdaRecurrence {
            qkv,
            gates,
            beta,
            pool,
            layer: LAYER,
            form,
            output,
        })?;
        let mut case = case.clone();
        case.qkv = lab.rounded(case.qkv);
        let rig = Self {
            pool,
            case,
            inputs: [qkv, gates, beta],
            output,
            step,
        };
        rig.poison(lab)?;
        Ok(rig)
    }

    /// Fills every slot of every layer with NaN.
    pub(super) fn poison(&self, lab: &mut Lab<'_>) -> Result<()> {
        let state = vec![f32::NAN; self.pool.layout.state_len()];
        let tail = vec![f32::NAN; self.pool.layout.tail_len()];
        for (layer, slot) in self.places() {
            let record = record(&self.pool.layout, &state, &tail);
            lab.backend.write_state(&self.pool, layer, slot, &record)?;
        }
        Ok(())
    }

    fn places(&self) -> impl Iterator<Item = (usize, Slot)> + use<> {
        let slots = self.pool.layout.slots as u32;
        (0..LAYERS).flat_map(move |layer| (0..slots).map(move |slot| (layer, Slot(slot))))
    }

    /// Writes a state, with a poisoned tail.
    pub(super) fn write(&self, lab: &mut Lab<'_>, slot: Slot, state: &[f32]) -> Result<()> {
        let tail = vec![f32::NAN; self.pool.layout.tail_len()];
        let record = record(&self.pool.layout, state, &tail);
        lab.backend.write_state(&self.pool, LAYER, slot, &record)
    }

    /// Writes the state that a sequence starts from into `slot`; `None` where it starts from zero.
    pub(super) fn seed(
        &self,
        lab: &mut Lab<'_>,
        sequence: usize,
        slot: Slot,
    ) -> Result<Option<Slot>> {
        let Some(state) = self.case.start(sequence).map(<[f32]>::to_vec) else {
            return Ok(None);
        };
        self.write(lab, slot, &state)?;
        Ok(Some(slot))
    }

    /// Reads a state as `[value_heads, K, V]`.
    pub(super) fn state(&self, lab: &mut Lab<'_>, slot: Slot) -> Result<Vec<f32>> {
        let record = lab.backend.read_state(&self.pool, LAYER, slot).wait()?;
        Ok(record.key_value().into_owned())
    }

    /// Everything that the pool holds.
    pub(super) fn snapshot(&self, lab: &mut Lab<'_>) -> Result<Vec<StateRecord>> {
        self.places()
            .map(|(layer, slot)| lab.backend.read_state(&self.pool, layer, slot).wait())
            .collect()
    }

    /// Compares the pool with an earlier snapshot, except the states in `written`.
    pub(super) fn untouched(
        &self,
        lab: &mut Lab<'_>,
        before: &[StateRecord],
        written: &[Slot],
    ) -> Result<()> {
        let after = self.snapshot(lab)?;
        for ((layer, slot), (before, after)) in self.places().zip(before.iter().zip(&after)) {
            if layer != LAYER || !written.contains(&slot) {
                let what = format!("the state in slot {} of layer {layer}, not named", slot.0);
                lab.same(what, &after.state, &before.state);
            }
            let what = format!("the tail in slot {} of layer {layer}", slot.0);
            lab.same(what, &after.tail, &before.tail);
        }
        Ok(())
    }

    /// Runs the rows `ranges`, laid end to end, as these pieces; gives the outputs `[rows, value_heads * V]`.
    pub(super) fn run(
        &mut self,
        lab: &mut Lab<'_>,
        ranges: &[Range<usize>],
        pieces: Vec<Piece>,
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
            lab.fill(tensor, &rows)?;
        }
        lab.poison(self.output)?;
        let tokens = ranges.iter().map(Range::len).sum();
        let batch = Batch {
            tokens: vec![0; tokens],
            pieces,
            outputs: Vec::new(),
        };
        lab.submit(&mut *self.step, &batch)?;
        lab.read(self.output, tokens)
    }

    /// The same with a single piece.
    pub(super) fn run_one(
        &mut self,
        lab: &mut Lab<'_>,
        range: Range<usize>,
        piece: Piece,
    ) -> Result<Vec<f32>> {
        self.run(lab, std::slice::from_ref(&range), vec![piece])
    }

    /// The inputs as the device holds them.
    pub(super) fn case(&self) -> &KdaCase {
        &self.case
    }
}

/// A piece of a sequence's recurrence.
pub(super) fn piece(length: usize, slot_in: Option<Slot>, slot_out: Slot) -> Piece {
    Piece {
        length,
        position: 0,
        slot_in,
        slot_out,
        checkpoints: Vec::new(),
        blocks: Vec::new(),
    }
}

/// One layer of one slot, laid out `[value_heads, K, V]`.
pub(super) fn record(layout: &StateLayout, state: &[f32], tail: &[f32]) -> StateRecord {
    StateRecord {
        orientation: Orientation::KeyValue,
        heads: layout.value_heads,
        key_width: layout.key_width,
        value_width: layout.value_width,
        state: state.to_vec(),
        channels: layout.channels(),
        tail: tail.to_vec(),
    }
}

/// The name of a form of the recurrence, as operations are named.
pub(super) const fn form_name(form: Form) -> &'static str {
    match form {
        Form::Auto => "kda_recurrence",
        Form::Chunk => "kda_chunk",
        Form::Step => "kda_step",
    }
}

/// Runs a ragged batch and compares outputs and final states, each sequence by itself.
pub(super) fn against_definition(lab: &mut Lab<'_>, case: &KdaCase, form: Form) -> Result<()> {
    let count = case.lengths.len();
    let mut rig = Rig::new(lab, case, form, count.max(1), 2 * count + 2)?;
    let (mut pieces, mut written) = (Vec::new(), Vec::new());
    for (i, length) in case.lengths.iter().enumerate() {
        // Every other sequence has its state updated in place.
        let (from, other) = (Slot(2 * i as u32 + 1), Slot(2 * i as u32));
        let slot_in = rig.seed(lab, i, from)?;
        let slot_out = if i % 2 == 0 { from } else { other };
        pieces.push(piece(*length, slot_in, slot_out));
        written.push(slot_out);
    }
    let before = if lab.timed() {
        Vec::new()
    } else {
        rig.snapshot(lab)?
    };
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let output = rig.run(lab, &ranges, pieces)?;
    if lab.timed() {
        return Ok(());
    }
    let answers = rig.case().answers();
    let width = case.shape[1] * case.shape[3];
    let len = case.layout(0).state_len();
    for (i, slot) in written.iter().enumerate() {
        let rows = ranges[i].start * width..ranges[i].end * width;
        let label = |what: &str| format!("{what} of sequence {i} ({} tokens)", case.lengths[i]);
        lab.close(
            label("outputs"),
            &output[rows.clone()],
            &answers.output[rows],
        );
        let state = rig.state(lab, *slot)?;
        lab.close(
            label("the state"),
            &state,
            &answers.states[i * len..(i + 1) * len],
        );
    }
    rig.untouched(lab, &before, &written)
}

impl Case {
    /// A case of the recurrence with inputs (and perhaps answers) from elsewhere.
    #[must_use]
    pub fn kda(name: &str, form: Form, case: KdaCase) -> Self {
        let (bytes, flops) = case.work(form);
        Self::new(form_name(form), name, Tolerance::Recurrence, move |lab| {
            against_definition(lab, &case, form)
        })
        .with_work(bytes, flops)
    }
}

/// A case of random inputs, made when it is run.
fn random_case(
    form: Form,
    name: String,
    make: impl Fn(&mut Random) -> KdaCase + Send + Sync + 'static,
) -> Case {
    Case::new(form_name(form), name, Tolerance::Recurrence, move |lab| {
        let case = make(&mut lab.random);
        against_definition(lab, &case, form)
    })
}

const HEAD: Shape = [1, 1, 128, 128];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for form in [Form::Chunk, Form::Step] {
        for (i, length) in LENGTHS.into_iter().enumerate() {
            let name = format!("init/T={length}");
            cases.push(random_case(form, name, move |random| {
                KdaCase::random(random, HEAD, &[length], Gates::Init, i % 2 == 0)
            }));
        }
        for gates in [
            Gates::Bounded,
            Gates::Masked,
            Gates::Frozen,
            Gates::Wild,
            Gates::Zero,
        ] {
            for length in [63, 130] {
                let name = format!("{}/T={length}", gates.name());
                cases.push(random_case(form, name, move |random| {
                    KdaCase::random(random, HEAD, &[length], gates, true)
                }));
            }
        }
        for length in [17, 130] {
            cases.push(random_case(
                form,
                format!("repeated/T={length}"),
                move |random| {
                    KdaCase::random(random, HEAD, &[length], Gates::Frozen, true).repeated(random)
                },
            ));
        }
        // Norms of the epsilon's size, and rows of zeros.
        for (name, scale) in [("small keys", 1e-4), ("zero keys", 0.0)] {
            cases.push(random_case(form, name.to_owned(), move |random| {
                KdaCase::random(random, HEAD, &[33], Gates::Init, true).scaled(scale)
            }));
        }
        for (name, beta) in [("beta=0", 0.0), ("beta=1", 1.0)] {
            cases.push(random_case(form, name.to_owned(), move |random| {
                let mut case = KdaCase::random(random, HEAD, &[33], Gates::Init, true);
                case.beta.fill(beta);
                case
            }));
        }
        for shape in [
            [3, 3, 32, 32],
            [2, 4, 64, 96],
            [1, 3, 128, 64],
            [2, 2, 20, 33],
            [1, 2, 33, 20],
            [5, 5, 16, 8],
        ] {
            let [hk, hv, k, v] = shape;
            for gates in [Gates::Init, Gates::Wild] {
                let name = format!("{}/H={hk},{hv} K={k} V={v}", gates.name());
                cases.push(random_case(form, name, move |random| {
                    KdaCase::random(random, shape, &[65, 0, 7], gates, true)
                }));
            }
        }
    }
    for form in [Form::Chunk, Form::Step, Form::Auto] {
        for (name, lengths) in [
            ("[1,33,0,100,7]", vec![1, 33, 0, 100, 7]),
            ("[16,17,63,64,65]", vec![16, 17, 63, 64, 65]),
            ("[1,1,1,1,1,1,1]", vec![1; 7]),
        ] {
            for (seeded, start) in [(true, "seeded"), (false, "from zero")] {
                let (name, lengths) = (format!("ragged {name}/{start}"), lengths.clone());
                cases.push(random_case(form, name, move |random| {
                    KdaCase::random(random, [2, 2, 64, 64], &lengths, Gates::Masked, seeded)
                }));
            }
        }
    }
    cases
}

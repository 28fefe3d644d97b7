//! Runs operations whose rows are independent: against the oracle, each row without the others, and repeatedly.

use crate::backend::{Batch, Element, Op, Result, Rows, Segment, Slot, Step, Tensor, TensorValues};
use crate::conformance::context::plain;
use crate::conformance::{Case, CaseContext, Tolerance};

/// One argument: its width, its element type, its rows.
pub(super) struct Input {
    pub(super) width: usize,
    pub(super) element: Element,
    pub(super) values: TensorValues,
}

impl Input {
    /// Rows of activations.
    pub(super) fn activation(width: usize, values: Vec<f32>) -> Self {
        Self {
            width,
            element: Element::Activation,
            values: TensorValues::F32(values),
        }
    }

    /// Rows of f32.
    pub(super) fn f32(width: usize, values: Vec<f32>) -> Self {
        Self {
            element: Element::F32,
            ..Self::activation(width, values)
        }
    }

    /// Rows of indices.
    pub(super) fn index(width: usize, values: Vec<u32>) -> Self {
        Self {
            width,
            element: Element::Index,
            values: TensorValues::Index(values),
        }
    }

    fn rows(&self, range: std::ops::Range<usize>) -> TensorValues {
        let range = range.start * self.width..range.end * self.width;
        match &self.values {
            TensorValues::F32(values) => TensorValues::F32(values[range].to_vec()),
            TensorValues::Index(values) => TensorValues::Index(values[range].to_vec()),
        }
    }
}

/// The expected result.
pub(super) enum Answer {
    /// Numbers, compared row by row.
    Rows(Vec<f64>),
    /// Numbers, compared element by element.
    Elements(Vec<f64>),
    /// Indices, all equal.
    Index(Vec<u32>),
}

/// The tensor that has a result.
pub(super) enum Place {
    /// A tensor of its own.
    New(Element),
    /// The argument with this index, which the operation updates.
    Input(usize),
}

/// One result: its name, width, tensor and expected values.
pub(super) struct Output {
    pub(super) name: &'static str,
    pub(super) width: usize,
    pub(super) place: Place,
    pub(super) answer: Answer,
}

impl Output {
    /// Activations, compared row by row.
    pub(super) fn activation(width: usize, answer: Vec<f64>) -> Self {
        Self {
            name: "the output",
            width,
            place: Place::New(Element::Activation),
            answer: Answer::Rows(answer),
        }
    }
}

/// Creates the operation from its arguments and results.
type MakeOp = Box<dyn Fn(&[Tensor], &[Tensor]) -> Op>;

/// How rows are divided into segments: the lengths of these.
pub(super) type Layout = fn(usize) -> Vec<usize>;

/// An operation with its arguments and expected results.
pub(super) struct Operation {
    pub(super) tokens: Vec<u32>,
    pub(super) layout: Layout,
    pub(super) inputs: Vec<Input>,
    pub(super) outputs: Vec<Output>,
    pub(super) op: MakeOp,
}

impl Operation {
    /// An operation that does not read token ids.
    pub(super) fn new(
        rows: usize,
        inputs: Vec<Input>,
        outputs: Vec<Output>,
        op: impl Fn(&[Tensor], &[Tensor]) -> Op + 'static,
    ) -> Self {
        Self {
            tokens: vec![0; rows],
            layout: |rows| vec![rows],
            inputs,
            outputs,
            op: Box::new(op),
        }
    }

    /// The same with its rows divided into several segments.
    pub(super) fn laid_out(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    /// The batch with this number of rows.
    fn batch(&self, rows: usize) -> Batch {
        laid_out(self.layout, rows)
    }
}

/// A batch with this number of rows, divided into several segments.
pub(super) fn laid_out(layout: Layout, rows: usize) -> Batch {
    let lengths = layout(rows);
    if let [length] = lengths[..] {
        return plain(length);
    }
    let segment = |(i, length): (usize, usize)| Segment {
        slot_out: Slot(i as u32),
        ..plain(length).segments.remove(0)
    };
    Batch {
        segments: lengths.into_iter().enumerate().map(segment).collect(),
        ..plain(rows)
    }
}

/// The property that is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// The oracle's result.
    Definition,
    /// Rows have the same bits with any other rows.
    Alone,
    /// The same call has the same bits in every repetition.
    Again,
}

struct Fixture {
    operation: Operation,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    step: Box<dyn Step>,
}

impl Fixture {
    fn new(ctx: &mut CaseContext<'_>, operation: Operation) -> Result<Self> {
        let rows = operation.tokens.len();
        let mut inputs = Vec::new();
        for input in &operation.inputs {
            inputs.push(ctx.blank(Rows::Tokens, rows, input.width, input.element)?);
        }
        let mut outputs = Vec::new();
        for output in &operation.outputs {
            outputs.push(match output.place {
                Place::New(element) => ctx.blank(Rows::Tokens, rows, output.width, element)?,
                Place::Input(i) => inputs[i],
            });
        }
        let op = (operation.op)(&inputs, &outputs);
        let step = ctx.compile(&operation.batch(rows), [op])?;
        Ok(Self {
            operation,
            inputs,
            outputs,
            step,
        })
    }

    /// Runs some of the rows; returns the results.
    fn run(
        &mut self,
        ctx: &mut CaseContext<'_>,
        range: std::ops::Range<usize>,
    ) -> Result<Vec<TensorValues>> {
        for tensor in &self.outputs {
            ctx.poison(*tensor)?;
        }
        for (tensor, input) in self.inputs.iter().zip(&self.operation.inputs) {
            ctx.poison(*tensor)?;
            ctx.backend
                .write_tensor(*tensor, &input.rows(range.clone()))?;
        }
        let rows = range.len();
        let batch = Batch {
            tokens: self.operation.tokens[range].to_vec(),
            ..self.operation.batch(rows)
        };
        ctx.submit(&mut *self.step, &batch)?;
        self.outputs
            .iter()
            .map(|tensor| ctx.backend.read_tensor(*tensor, rows).wait())
            .collect()
    }
}

/// Two results that must have the same bits; if `rows_in_f32` is a width, in f32 only.
fn alike(
    ctx: &mut CaseContext<'_>,
    what: String,
    a: &TensorValues,
    b: &TensorValues,
    rows_in_f32: Option<usize>,
) {
    match ((a, b), rows_in_f32) {
        ((TensorValues::F32(a), TensorValues::F32(b)), Some(width)) => {
            ctx.same_in_f32(what, width, a, b)
        }
        ((TensorValues::F32(a), TensorValues::F32(b)), None) => ctx.same(what, a, b),
        _ => ctx.holds(what, a == b),
    }
}

fn cut(values: &TensorValues, range: std::ops::Range<usize>) -> TensorValues {
    match values {
        TensorValues::F32(values) => TensorValues::F32(values[range].to_vec()),
        TensorValues::Index(values) => TensorValues::Index(values[range].to_vec()),
    }
}

/// Tests one property of one operation.
pub(super) fn ask(
    ctx: &mut CaseContext<'_>,
    question: Question,
    operation: Operation,
) -> Result<()> {
    let rows = operation.tokens.len();
    let mut fixture = Fixture::new(ctx, operation)?;
    let all = fixture.run(ctx, 0..rows)?;
    if ctx.timed() {
        return Ok(());
    }
    match question {
        Question::Definition => {
            for (output, values) in fixture.operation.outputs.iter().zip(&all) {
                let numbers = values.as_f32().unwrap_or(&[]);
                match &output.answer {
                    Answer::Rows(answer) => {
                        ctx.close(output.name, output.width, numbers, answer);
                    }
                    Answer::Elements(answer) => {
                        ctx.close_elements(output.name, numbers, answer);
                    }
                    Answer::Index(answer) => {
                        ctx.holds(output.name, values.as_index() == Some(answer));
                    }
                }
            }
        }
        Question::Alone => {
            // Backends that select kernels by a segment's length have one for single rows.
            let lengths = (fixture.operation.layout)(rows);
            let in_f32 = lengths.iter().any(|length| *length != 1);
            let mut row = 0;
            for length in lengths {
                if length == 1 && in_f32 {
                    let one = fixture.run(ctx, row..row + 1)?;
                    for (i, output) in fixture.operation.outputs.iter().enumerate() {
                        let range = row * output.width..(row + 1) * output.width;
                        let what = format!("{}, single row {row} alone", output.name);
                        alike(ctx, what, &one[i], &cut(&all[i], range), None);
                    }
                }
                row += length;
            }
            for count in [1, 2, 3, 5, 16] {
                for start in [0, 1, rows / 2, rows.saturating_sub(count)] {
                    if start + count > rows {
                        continue;
                    }
                    let few = fixture.run(ctx, start..start + count)?;
                    for (i, output) in fixture.operation.outputs.iter().enumerate() {
                        let range = start * output.width..(start + count) * output.width;
                        let what =
                            format!("{}, rows {start}..{} alone", output.name, start + count);
                        alike(
                            ctx,
                            what,
                            &few[i],
                            &cut(&all[i], range),
                            in_f32.then_some(output.width),
                        );
                    }
                }
            }
        }
        Question::Again => {
            for time in 2..=ctx.repeats {
                let next = fixture.run(ctx, 0..rows)?;
                for (i, output) in fixture.operation.outputs.iter().enumerate() {
                    let what = format!("{} of call {time}", output.name);
                    alike(ctx, what, &next[i], &all[i], None);
                }
            }
        }
    }
    Ok(())
}

/// The case of one operation against the oracle.
pub(super) fn definition(
    operation: &'static str,
    name: impl AsRef<str>,
    tolerance: Tolerance,
    make: impl Fn(&mut CaseContext<'_>) -> Result<Operation> + Send + Sync + 'static,
) -> Case {
    Case::new(operation, name, tolerance, move |ctx| {
        let made = make(ctx)?;
        ask(ctx, Question::Definition, made)
    })
}

/// The cases that an operation's rows do not depend on each other, and that it repeats its results.
pub(super) fn properties(
    operation: &'static str,
    make: impl Fn(&mut CaseContext<'_>) -> Result<Operation> + Clone + Send + Sync + 'static,
) -> [Case; 2] {
    [
        ("each row alone", Question::Alone),
        ("again", Question::Again),
    ]
    .map(|(name, question)| {
        let make = make.clone();
        Case::new(operation, name, Tolerance::Exact, move |ctx| {
            let made = make(ctx)?;
            ask(ctx, question, made)
        })
    })
}

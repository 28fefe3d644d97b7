//! Whether the bounds of half precision can be kept at all: a backend that computes in f32 and only rounds what it
//! writes to activations, to bf16 or to f16, must pass the list. The machines without such a device learn it here.

use kimi_linear::backend::*;
use kimi_linear::conformance::{Options, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Make;
use crate::wrapped::{Part, Wrap, Wrapped};

pub(crate) fn trials(make: Make) -> Vec<Trial> {
    [Precision::Bf16, Precision::F16]
        .map(|precision| {
            let name = format!("bounds/{precision:?} by rounding alone");
            Trial::test(name, move || holds(make, precision))
        })
        .into()
}

/// Cases whose values lie beyond the greatest f16: rounding makes them infinite, whatever the kernel does.
const BEYOND_F16: [&str; 2] = ["/loud values", "/large keys"];

fn holds(make: Make, precision: Precision) -> std::result::Result<(), Failed> {
    let mut failed = Vec::new();
    // Not the refusals: this wrapper submits an operation at a time, so the first has run when the second refuses.
    for case in cases()
        .into_iter()
        .filter(|case| case.operation != "refusals")
    {
        if precision == Precision::F16 && BEYOND_F16.iter().any(|name| case.name.ends_with(name)) {
            println!("{precision:?} cannot hold the values of {}", case.name);
            continue;
        }
        let wrapped = Wrapped::new(make(), Rounded(precision)).computing_in(precision);
        let mut backend: Box<dyn Backend> = Box::new(wrapped);
        let outcome = run(&case, &mut *backend, Options::default());
        let share = outcome.error / outcome.bound;
        println!(
            "{precision:?} {share:.2} of {:.1e}: {}",
            outcome.bound, case.name
        );
        if matches!(outcome.verdict, Verdict::Failed | Verdict::Lost) {
            let (error, detail) = (outcome.error, outcome.detail);
            failed.push(format!("{}: {error:.1e}, {detail}", case.name));
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(failed.join("\n").into())
}

/// Rounds what every operation writes to activations.
#[derive(Clone)]
struct Rounded(Precision);

impl Wrap for Rounded {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        let precision = self.0;
        let round = |op: &Op| {
            let written = op.operands().writes;
            Part::after(op.clone(), move |backend, batch| {
                let mut tensors = written.iter();
                tensors.try_for_each(|tensor| round(backend, *tensor, batch, precision))
            })
        };
        let whole = Program::from_iter([op.clone()]);
        Ok(whole.expanded(|_| false).ops.iter().map(round).collect())
    }
}

/// Rounds a tensor's rows of this batch, where they are activations.
fn round(
    backend: &mut dyn Backend,
    tensor: Tensor,
    batch: &Batch,
    precision: Precision,
) -> Result<()> {
    if tensor.element != Element::Activation {
        return Ok(());
    }
    let rows = match tensor.rows {
        Rows::Tokens => batch.tokens.len(),
        Rows::Outputs => batch.outputs.len(),
    };
    let values = backend.read_tensor(tensor, rows).wait()?;
    let round = |x: &f32| match precision {
        Precision::F32 => *x,
        Precision::F16 => half::f16::from_f32(*x).to_f32(),
        Precision::Bf16 => half::bf16::from_f32(*x).to_f32(),
    };
    let values = values.as_f32().unwrap().iter().map(round).collect();
    backend.write_tensor(tensor, &TensorValues::F32(values))
}

//! Exchanges between several devices: `all_reduce`, `all_gather` and the rows of experts over emulated GPUs that have joined each
//! other, against naive f64 sums. The list itself has one device, where a sum over ranks changes nothing.

use kimi_linear::backend::{
    AllGather, AllReduce, Backend, Batch, Capacity, Element, Op, OutputRow, Program, Result, Rows,
    Segment, Slot, Tensor, TensorValues,
};
use kimi_linear::conformance::Random;
use libtest_mimic::{Failed, Trial};

use crate::emulated::{ORDERS, open_at};

const TOKENS: usize = 5;

/// The trials of each number of ranks.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for ranks in [2, 3, 4] {
        for (name, element) in [("bf16", Element::Activation), ("f32", Element::F32)] {
            let trial = format!("cuda-emulated/all_reduce/{ranks} ranks, {name}");
            trials.push(Trial::test(trial, move || all_reduce(ranks, element)));
        }
        let trial = format!("cuda-emulated/all_gather/{ranks} ranks");
        trials.push(Trial::test(trial, move || all_gather(ranks)));
    }
    let name = "cuda-emulated/all_reduce/ranks that differ in what they sum".to_owned();
    trials.push(Trial::test(name, different));
    trials
}

/// Emulated GPUs that have joined each other.
fn joined(ranks: usize) -> Vec<Box<dyn Backend>> {
    let mut devices: Vec<_> = (0..ranks).map(|rank| open_at(rank, ORDERS)).collect();
    let id = devices[0].collective_id().unwrap();
    std::thread::scope(|scope| {
        for (rank, device) in devices.iter_mut().enumerate() {
            scope.spawn(move || device.join(id, rank, ranks).map(drop).unwrap());
        }
    });
    devices
}

/// All tokens, two of which are output rows.
fn batch() -> Batch {
    Batch {
        tokens: vec![0; TOKENS],
        segments: vec![Segment {
            length: TOKENS,
            position: 0,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: Vec::new(),
        }],
        outputs: [1, 4].map(|row| OutputRow { row, target: None }).to_vec(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

/// Runs a program on each device at the same time; `prepare` makes its tensors on device number `rank`, and the last is read.
fn submit(
    devices: Vec<Box<dyn Backend>>,
    prepare: impl Fn(usize, &mut dyn Backend) -> Result<(Op, Tensor)> + Sync,
) -> Vec<Result<Vec<f32>>> {
    let capacity = Capacity {
        tokens: TOKENS,
        segments: 1,
        outputs: TOKENS,
        blocks: 1,
        checkpoints: 0,
    };
    let run = |rank: usize, mut device: Box<dyn Backend>| {
        let (op, read) = prepare(rank, &mut *device)?;
        let mut step = device.compile(&Program::from_iter([op]), capacity)?;
        step.submit(&batch())?.wait()?;
        let rows = match read.rows {
            Rows::Tokens => TOKENS,
            Rows::Outputs => batch().outputs.len(),
        };
        match device.read_tensor(read, rows).wait()? {
            TensorValues::F32(values) => Ok(values),
            TensorValues::Index(_) => Ok(Vec::new()),
        }
    };
    std::thread::scope(|scope| {
        let run = &run;
        let devices = devices.into_iter().enumerate();
        let threads: Vec<_> = devices
            .map(|(rank, device)| scope.spawn(move || run(rank, device)))
            .collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    })
}

/// Values of a rank that bf16 holds exactly.
fn values(rank: usize, len: usize) -> Vec<f32> {
    let mut random = Random::new(&format!("rank {rank}"));
    let value = |_| f32::from_bits(random.normal().to_bits() & 0xffff_0000);
    (0..len).map(value).collect()
}

fn within(
    name: &str,
    found: &[f32],
    expected: &[f64],
    bound: f64,
) -> std::result::Result<(), Failed> {
    let greatest = expected
        .iter()
        .fold(0.0, |most: f64, value| most.max(value.abs()));
    let errors = found.iter().zip(expected);
    let error = errors.fold(0.0, |most: f64, (a, b)| most.max((f64::from(*a) - b).abs()));
    println!("{name}: error {:.2e}, bound {bound:.0e}", error / greatest);
    match found.len() == expected.len() && error <= bound * greatest {
        true => Ok(()),
        false => Err(format!("{name}: error {error:e} of {greatest:e}").into()),
    }
}

fn all_reduce(ranks: usize, element: Element) -> std::result::Result<(), Failed> {
    let width = 33;
    let found = submit(joined(ranks), |rank, device| {
        let target = device.tensor(Rows::Tokens, TOKENS, width, element)?;
        let own = values(rank, TOKENS * width);
        device.write_tensor(target, &TensorValues::F32(own))?;
        Ok((Op::from(AllReduce { target }), target))
    });
    let parts: Vec<_> = (0..ranks)
        .map(|rank| values(rank, TOKENS * width))
        .collect();
    let sum = |i: usize| parts.iter().map(|part| f64::from(part[i])).sum();
    let expected: Vec<f64> = (0..TOKENS * width).map(sum).collect();
    let bound = match element {
        Element::Activation => 4e-3,
        _ => 1e-6,
    };
    let first = found[0].clone()?;
    within("the sums", &first, &expected, bound)?;
    // Every rank has the same bits.
    match found.into_iter().all(|other| other == Ok(first.clone())) {
        true => Ok(()),
        false => Err("ranks have different sums".into()),
    }
}

fn all_gather(ranks: usize) -> std::result::Result<(), Failed> {
    let width = 7;
    let found = submit(joined(ranks), |rank, device| {
        let input = device.tensor(Rows::Outputs, TOKENS, width, Element::F32)?;
        let output = device.tensor(Rows::Outputs, TOKENS, ranks * width, Element::F32)?;
        let own = values(rank, 2 * width);
        device.write_tensor(input, &TensorValues::F32(own))?;
        Ok((Op::from(AllGather { input, output }), output))
    });
    let parts: Vec<_> = (0..ranks).map(|rank| values(rank, 2 * width)).collect();
    let rows = (0..2).flat_map(|row| {
        let columns = row * width..(row + 1) * width;
        parts
            .iter()
            .flat_map(move |part| part[columns.clone()].to_vec())
    });
    let expected: Vec<f32> = rows.collect();
    match found.into_iter().all(|found| found == Ok(expected.clone())) {
        true => Ok(()),
        false => Err("other columns than the ranks'".into()),
    }
}

/// A GPU would compute nonsense or wait for ever; the emulated machine notices.
fn different() -> std::result::Result<(), Failed> {
    let found = submit(joined(2), |rank, device| {
        let target = device.tensor(Rows::Tokens, TOKENS, 8 + rank, Element::F32)?;
        Ok((Op::from(AllReduce { target }), target))
    });
    match found.iter().all(|found| {
        found
            .as_ref()
            .is_err_and(|error| error.to_string().contains("different ones"))
    }) {
        true => Ok(()),
        false => Err(format!("{found:?}").into()),
    }
}

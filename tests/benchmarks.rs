//! The benchmarks without their clock: random models are the same on every backend, and the figures are computed correctly.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs
)]

#[cfg(feature = "cuda")]
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/replay.rs"]
mod replay;
#[path = "common/rounded.rs"]
mod rounded;
#[path = "common/wrapped.rs"]
mod wrapped;

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Batch, Block, Capacity, OutputRow, Result, Segment, Slot};
use kimi_linear::bench::interleaved::Interleaved;
use kimi_linear::bench::shape::{How, Options, Row, Work, measure};
use kimi_linear::bench::{Effort, interleaved, kernels, report};
use kimi_linear::config::Dtype;
use kimi_linear::config::ModelConfig;
use kimi_linear::conformance::floors::Sizes;
use kimi_linear::conformance::{By, Gates, Tolerance, norm_error, row_error};
use kimi_linear::model::{Limits, Model, StepOptions};
use replay::{Log, Mode, Replay};
use rounded::Rounded;

/// Maximum difference between the weights of an expert and the one chosen in its place.
const NEAR: f32 = 1e-1;

type Make = fn() -> Result<Box<dyn Backend>>;

fn cpu() -> Result<Box<dyn Backend>> {
    Ok(Box::new(CpuBackend::new()))
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Result<Box<dyn Backend>> {
    use kimi_linear::backend::wgpu::WgpuBackend;
    Ok(Box::new(WgpuBackend::new()?))
}

#[cfg(feature = "cuda")]
fn cuda_emulated() -> Result<Box<dyn Backend>> {
    Ok(emulated::open(&emulated::ORDERS[..1]))
}

fn backends() -> Vec<Make> {
    vec![
        cpu,
        #[cfg(feature = "wgpu")]
        wgpu,
        #[cfg(feature = "cuda")]
        cuda_emulated,
    ]
}

/// All logits of a prompt of a random model.
fn logits(backend: Box<dyn Backend>, seed: u32) -> Vec<f32> {
    let tokens = 21;
    let limits = Limits {
        step: Capacity {
            tokens,
            segments: 1,
            outputs: tokens,
            blocks: 2,
            checkpoints: 0,
        },
        slots: 1,
        blocks: 2,
        block_tokens: 16,
        cache: backend.device().cache,
    };
    let config = ModelConfig::tiny().unwrap();
    let mut last = 0;
    let mut model = Model::random(&config, seed, backend, limits, &mut |done| last = done).unwrap();
    assert_eq!(last, config.weight_bytes(kimi_linear::config::Dtype::Bf16));
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: true,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    let mut step = model.step(limits.step, step_options).unwrap();
    let batch = Batch {
        tokens: (0..tokens as u32).map(|i| i * 11 % 256).collect(),
        segments: vec![Segment {
            length: tokens,
            position: 0,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: vec![Block(0), Block(1)],
        }],
        outputs: (0..tokens)
            .map(|row| OutputRow { row, target: None })
            .collect(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let output = step.submit(&batch).unwrap().wait().unwrap();
    assert!(output.choices.iter().all(|choice| choice.finite));
    output.logits
}

/// Vocabulary of the tiny model: the width of a row of logits.
const VOCABULARY: usize = 256;

/// The relative error of all logits, and of the row with the largest error.
fn distance(a: &[f32], b: &[f32]) -> [f64; 2] {
    let reference: Vec<f64> = b.iter().map(|x| f64::from(*x)).collect();
    [
        norm_error(a, &reference),
        row_error(a, &reference, By::among(VOCABULARY)),
    ]
}

/// Maximum error of a bf16 device, compared with an oracle that rounds at the same points: that of a block of operations, and
/// the bound for the worst row that follows from it.
fn bf16_bounds(len: usize) -> [f64; 2] {
    let bound = Tolerance::Block.bound(Dtype::Bf16);
    let [row, _] = By::among(VOCABULARY).worst(len);
    [bound, row * bound]
}

/// The logits of a bf16 device compared with those of the oracle that rounds at the same points, with the oracle's experts:
/// one different expert changes a tiny model's logits by tens of percent.
fn beside_its_oracle(make: Make, seed: u32) -> ([f64; 2], Vec<replay::Flip>) {
    let log = Arc::<Mutex<Log>>::default();
    let oracle = Rounded::as_cuda(cpu().unwrap());
    let oracle = Replay::around(Box::new(oracle), Mode::Keep, &log);
    let expected = logits(Box::new(oracle), seed);
    let found = Replay::around(make().unwrap(), Mode::Replace, &log);
    let found = logits(Box::new(found), seed);
    let flips = std::mem::take(&mut log.lock().unwrap().flips);
    (distance(&found, &expected), flips)
}

#[test]
fn a_seed_is_one_model_on_every_backend() {
    let own = logits(cpu().unwrap(), 1);
    assert_eq!(own, logits(cpu().unwrap(), 1));
    let [far, _] = distance(&logits(cpu().unwrap(), 2), &own);
    assert!(far > 0.5, "another seed is another model: {far}");
    for make in backends() {
        let backend = make().unwrap();
        let (name, precision) = (backend.device().backend, backend.device().precision);
        if precision == Dtype::F32 {
            let [_, error] = distance(&logits(backend, 1), &own);
            println!("{name}: {error:.1e}");
            assert!(error < 1e-4, "{name}: {error}");
            continue;
        }
        for seed in [1, 2] {
            let ([error, row], flips) = beside_its_oracle(make, seed);
            let widest = flips.iter().map(|flip| flip.gap).fold(0.0, f32::max);
            println!(
                "{name}, seed {seed}: {error:.1e}, the worst row {row:.1e}; {} experts flipped, weights at most {widest:.1e} apart",
                flips.len()
            );
            let [most, most_row] = bf16_bounds(own.len());
            assert!(error < most && row < most_row, "{name}: {error}, {row}");
            assert!(widest < NEAR, "{name}: {flips:?}");
        }
    }
}

fn options(by_layer: bool) -> Options {
    Options {
        seed: 0,
        prefill_chunk: 32,
        by_layer,
        cache: None,
        effort: Some(Effort::least()),
    }
}

fn row(make: Make, config: &ModelConfig, work: &Work, by_layer: bool) -> Row {
    let mut make = make;
    measure(&mut make, config, work, &options(by_layer), &mut |_| {}).unwrap()
}

#[test]
fn a_shape_is_measured_over_caches_that_nothing_prefilled() {
    let hybrid = ModelConfig::tiny().unwrap();
    let all = hybrid.clone().mla_only();
    let decode = Work::Decode {
        context: 200,
        batch: 3,
    };
    let prefill = Work::Prefill { tokens: 300 };
    for make in backends() {
        let mut rows = Vec::new();
        for work in [&decode, &prefill] {
            for config in [&hybrid, &all] {
                rows.push(row(make, config, work, false));
            }
        }
        rows.push(row(make, &hybrid, &decode, true));
        for row in &rows {
            assert!(row.seconds.unwrap() > 0.0 && row.tokens_per_second.unwrap().is_finite());
        }
        assert_eq!((rows[0].variant, rows[0].layers), ("hybrid", [3, 1]));
        assert_eq!((rows[1].variant, rows[1].layers), ("all MLA", [0, 4]));
        assert_eq!(rows[1].latent_bytes, 4 * rows[0].latent_bytes);
        assert_eq!(rows[1].state_bytes, 0);
        assert_eq!(rows[0].how, How::Whole);
        assert_eq!(rows[4].how, How::ByLayer);
        // Ten segments of which five ran.
        assert_eq!(rows[2].segments, [5, 10]);
        let text = report::shape(&rows);
        for told in [
            "all MLA / hybrid",
            "one layer of each kind times their number",
            "5 of 10 segments",
        ] {
            assert!(text.contains(told), "{told}: {text}");
        }
    }
}

#[test]
fn what_does_not_fit_is_measured_by_layer() {
    let config = ModelConfig::tiny().unwrap();
    let work = Work::Decode {
        context: 4096,
        batch: 4,
    };
    let fits = |bytes| {
        kimi_linear::bench::shape::fits(
            &config,
            &work,
            &options(false),
            kimi_linear::config::Dtype::Bf16,
            Some(bytes),
        )
    };
    assert!(!fits(600_000) && fits(100_000_000));
}

#[test]
fn kernels_are_right_where_they_are_timed() {
    let options = kernels::Options {
        config: ModelConfig::tiny().unwrap(),
        sizes: Sizes::small(),
        effort: None,
        filter: None,
    };
    for make in backends() {
        let mut make = make;
        let report = kernels::run(&mut make, &options, &mut |_| {}).unwrap();
        assert!(report.rows.len() > 20, "{}", report.rows.len());
        for row in &report.rows {
            assert_eq!(row.refused, None, "{}", row.name);
            let tolerance = if row.name.starts_with("KDA") {
                Tolerance::Recurrence
            } else {
                Tolerance::Close
            };
            let bound = tolerance.bound(report.device.precision);
            let error = row.error.unwrap();
            println!(
                "{}: {}: {error:.1e} of {bound:.0e}",
                report.device.backend, row.name
            );
            assert!(error <= bound, "{}: {error} of {bound}", row.name);
            assert!(row.time.is_none());
        }
        let text = report::kernels(&[report.clone(), report]);
        assert!(text.contains("No timings were taken"), "{text}");
    }
}

#[test]
fn kernels_have_times_and_floors() {
    let options = kernels::Options {
        config: ModelConfig::tiny().unwrap(),
        sizes: Sizes::small(),
        effort: Some(Effort::least()),
        filter: Some("A decode".to_owned()),
    };
    let mut make: Make = cpu;
    let report = kernels::run(&mut make, &options, &mut |_| {}).unwrap();
    // KDA for one sequence and for several, alone and in its layer; latent attention over two contexts.
    assert_eq!(report.rows.len(), 6);
    for row in &report.rows {
        assert!(row.time.unwrap().seconds > 0.0, "{}", row.name);
        assert!(row.ratio().unwrap().is_finite(), "{}", row.name);
    }
}

#[test]
fn turns_hold_both_sides_to_one_reference() {
    let folder = tempfile::tempdir().unwrap();
    let [inputs, answers] = ["inputs", "answers"].map(|name| folder.path().join(name));
    for (lengths, gates) in [(vec![40, 40], Gates::Frozen), (vec![1; 3], Gates::Init)] {
        let options = interleaved::Options {
            heads: 5,
            width: 16,
            lengths: lengths.clone(),
            gates,
        };
        let mut turns = Interleaved::new(cpu().unwrap(), &options).unwrap();
        assert!(turns.run(2).unwrap() > 0.0);
        let errors = turns.errors().unwrap();
        assert!(errors.output < 1e-5 && errors.state < 1e-5, "{errors:?}");
        assert_eq!(errors.heads, [0, 1, 2, 3]);
        turns.write_inputs(&inputs).unwrap();
        let bytes = std::fs::read(&inputs).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tokens: usize = lengths.iter().sum();
        assert_eq!(tensors.tensor("q").unwrap().shape(), [tokens, 5, 16]);
        assert_eq!(tensors.tensor("initial").is_ok(), lengths[0] == 1);
        // Answers of zero have an error of 100 %.
        let zeros = |shape: &[usize]| vec![0_u8; 4 * shape.iter().product::<usize>()];
        let shapes = [vec![tokens, 5, 16], vec![lengths.len(), 5, 16, 16]];
        let data = [zeros(&shapes[0]), zeros(&shapes[1])];
        let views = ["o", "state"].into_iter().enumerate().map(|(i, name)| {
            let shape = shapes[i].clone();
            let dtype = safetensors::Dtype::F32;
            let view = safetensors::tensor::TensorView::new(dtype, shape, &data[i]).unwrap();
            (name, view)
        });
        safetensors::serialize_to_file(views, None, &answers).unwrap();
        let errors = turns.errors_of(&answers).unwrap();
        assert_eq!((errors.output, errors.state), (1.0, 1.0));
        let error = turns.errors_of(&inputs).unwrap_err().to_string();
        assert!(
            error.contains("o and state") || error.contains("o, state"),
            "{error}"
        );
    }
}

fn program(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kimi-linear"))
        .arg("bench")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments does not read stdin.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_command_line_times_a_checkpoint_as_llama_bench_does() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/tiny-a");
    let all = |more: &[&'static str]| {
        let first = ["model", "--model", model, "--backend", "cpu"];
        let mut arguments = first.to_vec();
        arguments.extend(["-p", "20,40", "-n", "3", "-d", "0,17", "-r", "2"]);
        arguments.extend(more);
        program(&arguments, "")
    };
    let tests = [
        "pp20",
        "pp40",
        "tg3",
        "pp20 @ d17",
        "pp40 @ d17",
        "tg3 @ d17",
    ];
    let json: serde_json::Value = serde_json::from_str(&stdout(&all(&["-o", "json"]))).unwrap();
    let rows = json.as_array().unwrap();
    let named: Vec<&str> = rows
        .iter()
        .map(|row| row["test"].as_str().unwrap())
        .collect();
    assert_eq!(named, tests);
    for row in rows {
        assert_eq!(
            (&row["model"], &row["backend"]),
            (&"tiny-a".into(), &"cpu".into())
        );
        assert_eq!(row["samples"].as_array().unwrap().len(), 2);
        assert!(row["median"].as_f64().unwrap() > 0.0 && row["size"].as_u64().unwrap() > 0);
    }
    assert_eq!(
        (&rows[4]["prompt"], &rows[4]["depth"]),
        (&40.into(), &17.into())
    );
    let table = stdout(&all(&["--prefill-chunk", "16"]));
    assert_eq!(table.lines().count(), 2 + tests.len());
    for (line, test) in table.lines().skip(2).zip(tests) {
        assert!(
            line.contains(&format!("| {test} |")) && line.contains(" ± "),
            "{line}"
        );
    }
    for (arguments, told) in [
        (vec!["-p", "0", "-n", "0"], "nothing to time"),
        (vec!["-d", "8K"], "expected at most the model's 8192"),
        (vec!["-n", "many"], "not a number of tokens"),
    ] {
        let first = vec!["model", "--model", model, "--backend", "cpu"];
        let output = program(&[first, arguments].concat(), "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(told), "{error}");
    }
}

#[test]
fn the_command_line_measures_shapes_kernels_and_turns() {
    let cpu = ["--backend", "cpu"];
    let with = |more: &[&'static str]| [&cpu[..], more].concat();
    let text = stdout(&program(
        &with(&[
            "--shape",
            "tiny",
            "--context",
            "64,128",
            "--batch",
            "2",
            "--compare",
            "--dry-run",
        ]),
        "",
    ));
    assert!(text.contains("No timings were taken") && text.contains("all MLA / hybrid"));
    let text = stdout(&program(
        &with(&[
            "--shape",
            "tiny",
            "--prefill",
            "40",
            "--layers",
            "3",
            "--json",
        ]),
        "",
    ));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["rows"][0]["variant"], "all KDA");
    assert_eq!(json["rows"][0]["tokens"], 40);
    let mut arguments = vec!["kernels", "--shape", "tiny", "--small", "--dry-run"];
    arguments.extend(["--backend", "cpu", "--beside", "cpu", "--filter", "MLA"]);
    let text = stdout(&program(&arguments, ""));
    assert!(
        text.contains("| MLA decode, 256 tokens, 1 sequence |"),
        "{text}"
    );
    let folder = tempfile::tempdir().unwrap();
    let inputs = folder.path().join("inputs");
    let mut arguments = vec!["interleaved", "--inputs", inputs.to_str().unwrap()];
    arguments.extend(["--heads", "2", "--width", "16", "--tokens", "20"]);
    arguments.extend(["--backend", "cpu"]);
    let text = stdout(&program(&arguments, "run 2\nerrors\nquit\nrun 1\n"));
    assert_eq!(text.lines().count(), 3, "{text}");
    for (arguments, told) in [
        (vec!["--shape", "nothing"], "neither 48b nor tiny"),
        (vec!["--shape", "tiny", "--layers", "9"], "this shape has 4"),
        (vec!["--context", "4K"], "--shape"),
        (
            vec!["--shape", "tiny", "--context", "4Q"],
            "not a number of tokens",
        ),
        (
            vec![
                "interleaved",
                "--inputs",
                "x",
                "--tokens",
                "4",
                "--sequences",
                "4",
            ],
            "two tokens",
        ),
    ] {
        let output = program(&arguments, "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(told), "{error}");
    }
}

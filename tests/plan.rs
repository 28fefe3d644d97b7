//! `plan` and `bench --profile` from a user's view, and the published profile compared with the program's own sizes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::process::{Command, Output};

use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear_plan::profile::Profile;
use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
    let command = command.args(arguments).env_remove("KIMI_LINEAR_LOG");
    command.output().unwrap()
}

#[track_caller]
fn text(arguments: &[&str]) -> String {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn object(arguments: &[&str]) -> Value {
    serde_json::from_str(&text(&[arguments, &["--json"]].concat())).unwrap()
}

/// Asserts that a command fails with `code` and prints only on stderr; returns that.
#[track_caller]
fn refusal(arguments: &[&str], code: i32) -> String {
    let output = run(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(
        output.stdout.is_empty() && !stderr.contains("panicked"),
        "{stderr}"
    );
    stderr
}

const CASE_STUDY: [&str; 6] = [
    "plan",
    "--local-profile",
    "1t-h20",
    "--profile",
    "1t-h200",
    "--link=100G",
];

#[test]
fn the_case_study_is_planned_in_all_three_forms() {
    let plan = object(&CASE_STUDY);
    let columns = plan["columns"].as_array().unwrap();
    let ways: Vec<_> = columns
        .iter()
        .map(|column| column["way"].as_str().unwrap())
        .collect();
    assert_eq!(ways, ["prfaas", "homogeneous", "naive"]);
    assert_eq!(
        (
            columns[0]["prefill"].as_u64(),
            columns[0]["decode"].as_u64()
        ),
        (Some(3), Some(5))
    );
    // Within a token of the result in the model's tests.
    assert!((columns[0]["threshold"].as_f64().unwrap() - 19_068.0).abs() < 60.0);
    assert!(columns[1]["threshold"].is_null());
    assert_eq!(columns[2]["stages"]["limit"], "prfaas_prefill");

    let table = text(&CASE_STUDY);
    assert!(
        table.starts_with("Computed from profiles; not measured"),
        "{table}"
    );
    for part in [
        "| PrfaaS-PD | homogeneous | naive split |",
        "4 / 3 / 5",
        "= 1.5",
        "| one PrfaaS node |",
    ] {
        assert!(table.contains(part), "{part} in\n{table}");
    }

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plan.svg");
    text(&[&CASE_STUDY[..], &["--svg", file.to_str().unwrap()]].concat());
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("local prefill") && svg.contains("threshold"));
}

#[test]
fn a_generated_trace_is_replayed_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("replay.svg");
    let arguments = [
        "plan",
        "replay",
        "lognormal:9.90,1.00,128,128000",
        "--local-profile",
        "1t-h20",
        "--count",
        "400",
        "--arrivals",
        "bursts:3,2m,20s",
        "--link",
        "20G",
        "--link-change",
        "1m=0.2",
        "--link-change",
        "2m=1",
        "--sweep",
        "3",
        "--svg",
        file.to_str().unwrap(),
    ];
    let report = object(&arguments);
    assert_eq!(report["trace"]["requests"], 400);
    assert_eq!(report["ways"].as_array().unwrap().len(), 3);
    assert_eq!(report["ways"][0]["outcome"]["requests"], 400);
    assert!(report["sweep"]["best"]["throughput"].as_f64().unwrap() > 0.0);
    assert_eq!(report, object(&arguments), "the same seed gives the same");
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.contains("time to the first token") && svg.contains("the link"));
    let table = text(&arguments);
    assert!(
        table.contains("| simulated throughput, req/s |") && table.contains("best of the sweep"),
        "{table}"
    );
}

#[test]
fn a_trace_file_is_replayed_with_its_prefixes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.jsonl");
    let line = |i: u64| {
        let turn = i / 3 + 1;
        let ids: Vec<u64> = (0..8 * turn).map(|block| (i % 3) * 1000 + block).collect();
        let tokens = 8 * turn * 512 - 50;
        serde_json::json!({"timestamp": i * 4000, "input_length": tokens, "output_length": 50, "hash_ids": ids}).to_string() + "\n"
    };
    std::fs::write(&file, (0..30).map(line).collect::<String>()).unwrap();
    let file = file.to_str().unwrap();
    let report = object(&["plan", "replay", file]);
    let spared = &report["ways"][1]["outcome"];
    // Each turn of three conversations continues from the one before.
    assert!(
        spared["cached_tokens"].as_f64().unwrap() > 0.7 * spared["prompt_tokens"].as_f64().unwrap()
    );
    let small = object(&["plan", "replay", file, "--cache-blocks", "10"]);
    assert!(
        small["ways"][1]["outcome"]["cached_tokens"].as_u64() < spared["cached_tokens"].as_u64()
    );
    assert!(
        object(&["plan", "--requests", file])["uncached_tokens"]["mean"]
            .as_f64()
            .unwrap()
            < 5000.0
    );
}

#[test]
fn what_cannot_be_planned_is_refused_in_a_sentence() {
    let unknown = refusal(&["plan", "--profile", "h100"], 1);
    assert!(
        unknown.contains(
            "`h100` is neither a file nor built in; built in are 1t-h200, 1t-h20, 48b-h200"
        ),
        "{unknown}"
    );
    assert!(refusal(&["plan", "--link", "fast"], 2).contains("100G"));
    assert!(
        refusal(&["plan", "--requests", "lognormal:1,2"], 2)
            .contains("lognormal:MU,SIGMA,LOW,HIGH")
    );
    assert!(
        refusal(&["plan", "--requests", "no-such-file"], 1).contains("cannot read no-such-file")
    );
    assert!(
        refusal(&["plan", "--nodes", "1", "--prfaas-nodes", "0"], 1)
            .contains("one node cannot both")
    );
    assert!(refusal(&["plan", "replay", "no-such-file"], 1).contains("cannot read no-such-file"));
    assert!(
        refusal(
            &[
                "plan",
                "replay",
                "lognormal:9,1,1,9K",
                "--arrivals",
                "waves"
            ],
            2
        )
        .contains("bursts:FACTOR")
    );
    let loss = refusal(&["plan", "replay", "lognormal:9,1,1,9K", "--loss", "1"], 1);
    assert!(loss.contains("the link"), "{loss}");
}

#[test]
fn the_help_gives_a_reason_for_every_trigger() {
    let help = text(&["plan", "replay", "--help"]);
    for option in [
        "--window",
        "--horizon",
        "--use-trigger",
        "--loss-trigger",
        "--convert-gain",
        "--probe",
    ] {
        assert!(help.contains(option), "{option}");
    }
    assert!(text(&["plan", "--help"]).contains("2604.15039"));
}

#[test]
fn a_measured_profile_is_one_that_a_plan_reads() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("here.json");
    let file = file.to_str().unwrap();
    let arguments = [
        "bench",
        "--shape",
        "tiny",
        "--backend",
        "cpu",
        "--prefill",
        "64,2K",
        "--slots",
        "2",
        "--profile",
        file,
    ];
    let printed = object(&arguments);
    let profile = Profile::open(file).unwrap();
    assert_eq!(profile.name(), "here");
    assert_eq!(serde_json::to_value(&profile).unwrap(), printed);
    let config = ModelConfig::tiny().unwrap();
    for (point, tokens) in profile.points().iter().zip([64, 2048]) {
        let latents = config.latent_bytes_per_token(Dtype::F32) * tokens;
        assert_eq!(point.tokens, tokens);
        assert_eq!(point.bytes, config.kda_state_bytes(Dtype::F32) + latents);
        assert!(point.seconds > 0.0);
    }
    assert_eq!(profile.decode().slots, 2);
    let plan = object(&[
        "plan",
        "--profile",
        file,
        "--requests",
        "lognormal:6,1,16,2K",
    ]);
    assert!(plan["columns"][0]["stages"]["throughput"].as_f64().unwrap() > 0.0);
    assert!(refusal(&["bench", "--profile", file, "--compare"], 2).contains("cannot be used with"));
}

#[test]
fn bursts_are_replayed_under_every_policy_and_in_all_three_forms() {
    let directory = tempfile::tempdir().unwrap();
    let svg = directory.path().join("bursts.svg");
    let arguments = [
        "plan",
        "replay",
        "lognormal:7,0.8,16,8K",
        "--burst",
        "--count=400",
        "--rate=20",
        "--arrivals=bursts:2,20s,5s",
        "--answers=lognormal:5,0.6,16,1K",
    ];
    let drawn = format!("--svg={}", svg.display());
    let replayed = object(&[&arguments[..], &[drawn.as_str()]].concat());
    let policies = replayed["policies"].as_array().unwrap();
    let names: Vec<_> = policies
        .iter()
        .map(|one| one["policy"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["recompute", "swap", "migrate", "pipeline", "drop"]);
    for one in policies {
        assert_eq!(one["requests"], 400);
        assert!(one["ttft"]["p999"].as_f64() >= one["ttft"]["p50"].as_f64());
    }
    assert_eq!(replayed["drop"], "layers");
    assert!(std::fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    let table = text(&arguments);
    assert!(table.starts_with("A simulation in virtual time"), "{table}");
    assert!(
        table.contains("| recompute | swap | migrate | pipeline | drop |"),
        "{table}"
    );

    let with = |more: &[&'static str]| [&arguments[..], more].concat();
    let failing = refusal(&with(&["--fail=1m=9"]), 1);
    assert!(
        failing.contains("instance 9 fails, but there are 0 to 7"),
        "{failing}"
    );
    let form = refusal(&with(&["--drop=experts"]), 1);
    assert!(
        form.contains("cannot drop experts; expected layers"),
        "{form}"
    );
    assert!(refusal(&with(&["--demand=0.4"]), 2).contains("cannot be used with"));
}

/// The bytes of the built-in 48B profile are those that `inspect` prints for the published model in bf16.
#[test]
fn the_published_profile_has_this_programs_sizes() {
    let config = ModelConfig::published().unwrap();
    let profile = Profile::open("48b-h200").unwrap();
    for point in profile.points() {
        let latents = config.latent_bytes_per_token(Dtype::Bf16) * point.tokens;
        assert_eq!(
            point.bytes,
            config.kda_state_bytes(Dtype::Bf16) + latents,
            "{}",
            point.tokens
        );
    }
}

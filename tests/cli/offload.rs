//! Experts of some layers on the CPU, as the flags say.

use super::*;

const GENERATE: [&str; 9] = [
    "generate",
    "--prompt-tokens",
    "1,2,3,4,5,6,7",
    "--max-tokens",
    "12",
    "--temperature",
    "0",
    "--ignore-eos",
    "--backend",
];

#[test]
fn on_the_cpu_the_flag_has_no_effect_and_says_so() {
    let whole = object(&[&GENERATE[..], &["cpu"]].concat(), "tiny-a");
    for layers in ["2", "auto"] {
        let arguments = [&GENERATE[..], &["cpu", "--n-cpu-moe", layers, "--json"]].concat();
        let output = run(&arguments, "tiny-a");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert!(stderr.contains("--n-cpu-moe has no effect"), "{stderr}");
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["tokens"], whole["tokens"]);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_with_experts_on_the_cpu_gives_the_same_answer() {
    let whole = object(&[&GENERATE[..], &["cpu"]].concat(), "tiny-a");
    for layers in ["0", "1", "4"] {
        let flags = ["wgpu", "--n-cpu-moe", layers];
        let found = object(&[&GENERATE[..], &flags].concat(), "tiny-a");
        assert_eq!(found["tokens"], whole["tokens"], "{layers}");
    }
    // The device is named with what the CPU has of the model.
    let flags = ["wgpu", "--n-cpu-moe", "2"];
    let output = run(&[&GENERATE[..], &flags].concat(), "tiny-a");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("experts of 2 layers on"), "{stderr}");
    let score = ["score", "--tokens", "1,2,3,4,5", "--backend"];
    let likelihood = |flags: &[&str]| {
        let report = object(&[&score, flags].concat(), "tiny-a");
        report["negative_log_likelihood"].as_f64().unwrap()
    };
    let [whole, found] = [&["cpu"][..], &flags].map(likelihood);
    assert!((found - whole).abs() < 1e-3 * whole, "{found} and {whole}");
}

#[cfg(feature = "wgpu")]
#[test]
fn too_little_memory_is_refused_even_with_all_experts_on_the_cpu() {
    let flags = [
        "wgpu",
        "--n-cpu-moe",
        "auto",
        "--gpu-memory-utilization",
        "0.0000001",
    ];
    let output = run(&[&GENERATE[..], &flags].concat(), "tiny-a");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    // A discrete GPU does not report its memory to wgpu.
    assert!(
        message.contains("--n-cpu-moe auto: with the experts of all layers on the CPU")
            || message.contains("does not report the memory"),
        "{message}"
    );
}

#[test]
fn what_cannot_be_is_refused_before_a_device_is_opened() {
    let refused = |flags: &[&str]| {
        let generate = ["generate", "--prompt", "a", "--backend", "cpu"];
        refusal(&run(&[&generate, flags].concat(), "tiny-a"))
    };
    let message = refused(&["--n-cpu-moe", "5"]);
    assert!(
        message.contains("--n-cpu-moe 5: the model has 4 layers with experts"),
        "{message}"
    );
    for flags in [
        &["--tensor-parallel-size", "2"][..],
        &["--ep-size", "2"],
        &["--pp", "2"],
        &["--nnodes", "2"],
    ] {
        let message = refused(&[&["--n-cpu-moe", "1"], flags].concat());
        assert!(message.contains("beside a single device"), "{message}");
    }
    let message = refused(&["--gpu-memory-utilization", "2"]);
    assert!(message.contains("at most 1, but is 2"), "{message}");
    let output = run(
        &["generate", "--prompt", "a", "--n-cpu-moe", "some"],
        "tiny-a",
    );
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("`some` is neither a number of layers nor `auto`"),
        "{stderr}"
    );
}

#[test]
fn inspect_says_what_device_and_host_hold_and_how_fast_a_decode_can_be() {
    let inspect = |more: &[&str]| {
        let arguments = ["inspect", "--shape", "48b", "--context", "4096"];
        let output = program(&[&arguments, more].concat(), None)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!inspect(&[]).contains("tokens/s"));
    let report: Value = serde_json::from_str(&inspect(&["--n-cpu-moe", "10", "--json"])).unwrap();
    for device in report["devices"].as_array().unwrap() {
        let split = &device["offload"]["split"];
        if split.is_null() {
            // A device that cannot be opened says why.
            assert!(device["offload"]["problem"].is_string(), "{device}");
            continue;
        }
        let bytes = |name: &str| split[name].as_u64().unwrap();
        let layers = match device["device"]["backend"].as_str() {
            Some("cpu") => 0,
            _ => 10,
        };
        assert_eq!(bytes("host_layers"), layers);
        assert_eq!(
            bytes("host_weight_bytes"),
            layers * 256 * 3 * 1024 * 2304 * 2
        );
        assert_eq!(
            bytes("device_weight_bytes") + bytes("host_weight_bytes"),
            report["weight_bytes"].as_u64().unwrap()
        );
        assert!(split["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(split["decode"]["exchanges"], layers);
    }
    let text = inspect(&["--n-cpu-moe", "26"]);
    assert!(text.contains("decode over 4096 tokens: at most"), "{text}");
    assert!(text.contains("tokens/s, limited by"), "{text}");
    #[cfg(feature = "wgpu")]
    assert!(
        text.contains("experts of 26 of 26 layers on the CPU: device"),
        "{text}"
    );
}

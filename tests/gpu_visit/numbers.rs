//! How measured numbers are reported: with made-up results of a visit, because a rehearsal has no times.

use std::path::Path;
use std::process::Command;

use serde_json::json;

/// A headline's JSON as `bench` prints it.
fn bench(how: &str, seconds: f64, floor: f64) -> String {
    let row = json!({
        "how": how, "segments": [1, 1], "seconds": seconds, "floor_seconds": floor,
        "operations": [["select", 0.2], ["moe_block", 1.25]],
    });
    json!({ "device": {}, "timings": true, "rows": [row] }).to_string()
}

pub(crate) fn beside_prediction_and_floor() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let file = |name: &str, text: &str| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let predicted = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/gpu/predicted.json");
    let predicted = std::fs::read_to_string(predicted).unwrap();
    let predicted: serde_json::Value = serde_json::from_str(&predicted).unwrap();
    let expected = |name: &str| predicted["seconds"][name].as_f64().unwrap();
    for name in [
        "decode-4k",
        "batch64-4k",
        "decode-128k",
        "prefill-8k",
        "prefill-128k",
    ] {
        assert!(expected(name) > 0.0);
    }

    let whole = file(
        "bench/decode-4k.json",
        &bench("whole", 1.5 * expected("decode-4k"), 1.32e-3),
    );
    let layers = file("bench/prefill-8k.json", &bench("by_layer", 0.2, 0.1));
    let broken = file("bench/decode-128k.json", "");
    file("bench/decode-128k.json.err", "error: too little memory\n");
    file("settings", "backend\tcuda\nshape\t48b\n");
    let smoke = file("smoke-cubin", "");
    let steps = [
        ("smoke: cubin", 0, &smoke),
        ("bench decode-4k", 0, &whole),
        ("bench prefill-8k", 0, &layers),
        ("bench decode-128k", 1, &broken),
    ];
    let line = |(name, code, path): &(&str, i32, &String)| {
        format!("first\t{name}\t{code}\t3\t1\t60\t{path}\n")
    };
    file("steps", &steps.iter().map(line).collect::<String>());
    file("pack/names.txt", "add/again\n");
    file(
        "operations.list",
        &format!(
            "0\t1\t60\t{}\tadd/\n",
            file("add", "ok    add/again  exact\n")
        ),
    );

    let output = Command::new("python3")
        .arg("-B")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/gpu/summary.py"))
        .arg("files")
        .args([root, &root.join("pack"), &root.join("out")])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let of = |name: &str| {
        told.lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default()
    };
    let decode = of("decode-4k: ");
    for part in [
        "predicted for H200",
        "(x 1.50)",
        "floor 1.32 ms",
        "| all layers",
        "moe_block 1.25 ms, select 200 us",
    ] {
        assert!(decode.contains(part), "{part}: {decode}\n{told}{errors}");
    }
    let prefill = of("prefill-8k: ");
    assert!(
        prefill.contains("floor 100 ms (x 2.00)") && prefill.contains("| BY LAYER"),
        "{told}{errors}"
    );
    assert_eq!(
        of("decode-128k: "),
        "decode-128k: none: exit 1: error: too little memory"
    );
    assert!(
        told.contains("wrong besides cases: bench decode-128k: exit 1\n"),
        "{told}{errors}"
    );
    assert_eq!(output.status.code(), Some(1), "{told}{errors}");
}

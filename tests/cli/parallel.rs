//! Models divided among several devices, as the flags say.

use super::*;

/// The greedy answer to a prompt, on the CPU.
fn generated(more: &[&str]) -> Value {
    let arguments = [
        "generate",
        "--backend",
        "cpu",
        "--prompt-tokens",
        "1,2,3,4,5,6,7",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        "--ignore-eos",
    ];
    object(&[&arguments, more].concat(), "tiny-a")["tokens"].clone()
}

#[test]
fn a_divided_model_gives_the_same_answer() {
    let whole = generated(&[]);
    assert_eq!(whole.as_array().unwrap().len(), 12);
    for flags in [
        &["--tensor-parallel-size", "2"][..],
        &["--tp", "2", "--enable-expert-parallel"],
        &["--expert-parallel-size", "8"],
        &["--ep-size", "4", "--pipeline-parallel-size", "2"],
        &["--pp", "5", "--device", "0,0,0,0,0"],
    ] {
        assert_eq!(generated(flags), whole, "{flags:?}");
    }
}

/// A process that is killed when the test ends.
struct Started(std::process::Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Four ranks in two processes answer like one device; without the second one a sentence says what is waited for.
#[test]
fn two_processes_give_the_same_answer() {
    let whole = generated(&[]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let shared = [
        "--ep-size",
        "2",
        "--pp",
        "2",
        "--nnodes",
        "2",
        "--master-port",
        &port,
    ];
    let mut node = program(
        &[
            &[
                "generate",
                "--backend",
                "cpu",
                "--prompt",
                "a",
                "--node-rank",
                "1",
            ],
            &shared[..],
        ]
        .concat(),
        Some(&reference("tiny-a")),
    );
    let _node = Started(node.stderr(std::process::Stdio::null()).spawn().unwrap());
    // The node stays for another process after the first has ended.
    for _ in 0..2 {
        assert_eq!(generated(&shared), whole);
    }
}

#[test]
fn nodes_that_cannot_be_are_refused() {
    let refused = |more: &[&str]| {
        let arguments = ["generate", "--backend", "cpu", "--prompt", "a"];
        let output = run(&[&arguments, more].concat(), "tiny-a");
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let message = refused(&["--nnodes", "2", "--tp", "1"]);
    assert!(
        message.contains("is not a multiple of the number of nodes"),
        "{message}"
    );
    let message = refused(&["--nnodes", "2", "--tp", "2", "--node-rank", "2"]);
    assert!(
        message.contains("--node-rank should be below --nnodes (2), but is 2"),
        "{message}"
    );
    let message = refused(&["--nnodes", "2", "--tp", "2", "--master-addr", "0.0.0.0"]);
    assert!(message.contains("set KIMI_LINEAR_NODE_SECRET"), "{message}");
}

#[test]
fn degrees_that_cannot_be_are_refused() {
    let refused = |more: &[&str]| {
        let arguments = ["generate", "--backend", "cpu", "--prompt", "a"];
        let output = run(&[&arguments, more].concat(), "tiny-a");
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let message = refused(&["--tensor-parallel-size", "3"]);
    let expected =
        "tensor parallelism of degree 3: the model has 2 KDA heads: the degrees 1 and 2 work";
    assert!(message.contains(expected), "{message}");
    let message = refused(&["--ep-size", "3"]);
    assert!(
        message.contains("8 experts: the degrees 1, 2, 4 and 8 work"),
        "{message}"
    );
    let message = refused(&["--pp", "6"]);
    assert!(
        message.contains("1 to 5, the number of layers, but is 6"),
        "{message}"
    );
    let message = refused(&["--tp", "2", "--device", "0"]);
    assert!(
        message.contains("--device: the number of devices should be 2, one for each part"),
        "{message}"
    );
    let message = refused(&["--tp", "2", "--device", "0,1"]);
    assert!(message.contains("there is no cpu device 1"), "{message}");
    let message = refused(&["--device", "0,0"]);
    assert!(
        message.contains("--device: the number of devices should be 1"),
        "{message}"
    );
    let message = refused(&["--tp", "2", "--ep-size", "2"]);
    assert!(message.contains("cannot be used with"), "{message}");
}

#[test]
fn inspect_says_what_each_device_holds() {
    let inspect = |more: &[&str]| {
        let command = program(
            &[&["inspect", "--shape", "48b", "--context", "128K"], more].concat(),
            None,
        );
        let mut command = command;
        let output = command.output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!inspect(&[]).contains("divided"));
    let text = inspect(&["--tensor-parallel-size", "8"]);
    assert!(
        text.contains("divided among 8 devices\n  devices 0 to 7, each: weights"),
        "{text}"
    );
    let report: Value = serde_json::from_str(&inspect(&["--pp", "2", "--json"])).unwrap();
    let ranks = report["divided"]["ranks"].as_array().unwrap();
    let sum: u64 = ranks
        .iter()
        .map(|rank| rank["weights"].as_u64().unwrap())
        .sum();
    assert_eq!(ranks.len(), 2);
    assert_eq!(report["weight_bytes"], sum);
    // Three of seven MLA layers are in the first stage: 128K tokens of 1,152 bytes.
    assert_eq!(ranks[0]["latents"], 3 * 131_072 * 1152_u64);
    assert_eq!(report["divided"]["sent_per_token"], 2 * 4 * 2304);
}

//! Commands that a new user is likely to try.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use super::*;

/// Runs with something on stdin.
fn piped(arguments: &[&str], stdin: &str) -> Output {
    let mut child = program(arguments, None)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(stdin.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn answer(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Output of a command line, for any exit code.
fn said(arguments: &[&str]) -> String {
    let output = program(arguments, None).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

const FACT: &str = "The red box holds 7. What does the red box hold?";

#[test]
fn a_model_that_is_not_there_is_told_how_to_get() {
    let home = tempfile::tempdir().unwrap();
    let told = |model: &str| {
        let mut command = program(&["generate", "x", "--model", model], None);
        refusal(&command.env("HF_HOME", home.path()).output().unwrap())
    };
    let hub = told("moonshotai/Kimi-Linear-48B-A3B-Instruct");
    for part in [
        "not, or not in full, in the cache",
        "`kimi-linear pull moonshotai/Kimi-Linear-48B-A3B-Instruct` downloads it",
        "98 GB",
    ] {
        assert!(hub.contains(part), "{hub}");
    }
    let quantised = told("someone/Kimi-Linear-GGUF:Q4_K_M");
    assert!(
        quantised.contains("`kimi-linear pull someone/Kimi-Linear-GGUF:Q4_K_M`"),
        "{quantised}"
    );
    let url = told("https://example.org/moonshotai/Kimi-Linear-48B-A3B-Instruct");
    assert!(
        url.contains("is a URL") && url.contains("`kimi-linear pull moonshotai/Kimi"),
        "{url}"
    );
    assert!(told("demo").contains("without --model"));
    assert!(told("48b").contains("--shape 48b"));
    for path in ["./nowhere", "src/nowhere"] {
        let missing = told(path);
        assert_eq!(
            missing,
            format!("error: there is no file or folder `{path}`\n")
        );
    }
}

#[test]
fn files_that_are_no_model_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let told = |name: &str, bytes: &[u8]| {
        let file = folder.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let output = program(&["inspect"], Some(&file)).output().unwrap();
        refusal(&output)
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    assert!(told("model.gguf", pointer).contains("Git LFS pointer"));
    assert!(told("model.safetensors", b"{}").contains("the folder that it is in"));
}

#[test]
fn an_error_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    let told = || {
        let output = program(&["inspect"], Some(folder.path())).output().unwrap();
        refusal(&output)
    };
    for (text, sentence) in [
        (None, "No such file or directory"),
        (Some("[1"), "not JSON"),
        (
            Some(r#"{"model_type": "llama"}"#),
            "only \"kimi_linear\" is supported",
        ),
    ] {
        if let Some(text) = text {
            std::fs::write(&config, text).unwrap();
        }
        let told = told();
        assert_eq!(told.matches(sentence).count(), 1, "{told}");
    }
}

#[test]
fn one_command_answers_one_question() {
    let answers = [
        program(&["run", FACT], None).output().unwrap(),
        program(&["run", "-p", FACT, "--backend", "CPU"], None)
            .output()
            .unwrap(),
        program(&["generate", "--chat", "--prompt", FACT], None)
            .output()
            .unwrap(),
        piped(&["run"], &format!("{FACT}\n")),
        piped(&["run"], &format!("\u{feff}{FACT}\r\n")),
    ]
    .map(|output| answer(&output));
    assert_eq!(answers[0], "The red box holds 7.\n");
    for other in &answers {
        assert_eq!(*other, answers[0]);
    }
    let short = program(
        &["generate", "Hello", "-n", "1", "-s", "-1", "--temp", "1"],
        None,
    );
    assert!({ short }.output().unwrap().status.success());
    let system = said(&["generate", "Hello", "--system", "Be brief."]);
    assert!(
        system.contains("--chat") && system.contains("kimi-linear run"),
        "{system}"
    );
    let output = program(
        &["run", "Hi", "--system", "Be brief."],
        Some(&reference("tiny-a")),
    )
    .args(["--json", "-n", "1"])
    .output()
    .unwrap();
    let with: Value = serde_json::from_slice(&output.stdout).unwrap();
    let without = object(&["run", "Hi", "-n", "1"], "tiny-a");
    let count = |report: &Value| report["prompt_tokens"].as_array().unwrap().len();
    assert!(count(&with) > count(&without), "the system prompt is in it");
}

#[test]
fn files_of_windows_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file.display().to_string()
    };
    let tokens = |arguments: &[&str]| {
        let report = object(&[arguments, &["-n", "1"]].concat(), "tiny-a");
        report["prompt_tokens"].clone()
    };
    let plain = tokens(&["generate", "one\ntwo"]);
    let windows = file("prompt.txt", "\u{feff}one\r\ntwo\r\n");
    assert_eq!(tokens(&["generate", "-f", &windows]), plain);
    let chat = r#"{"messages": [{"role": "user", "content": "Hi"}]}"#;
    let plain = tokens(&["generate", "--messages", &file("chat.json", chat)]);
    for (name, text) in [
        ("bom.json", format!("\u{feff}{chat}\r\n")),
        (
            "list.json",
            r#"[{"role": "user", "content": "Hi"}]"#.to_owned(),
        ),
    ] {
        assert_eq!(
            tokens(&["generate", "--messages", &file(name, &text)]),
            plain
        );
    }
    let robot = file("robot.json", r#"[{"role": "robot", "content": "Hi"}]"#);
    let told = refusal(&run(&["generate", "--messages", &robot], "tiny-a"));
    assert!(
        told.contains("messages[0].role") && told.contains("robot"),
        "{told}"
    );
    let text = file("text.json", "hello");
    let told = refusal(&run(&["generate", "--messages", &text], "tiny-a"));
    assert!(told.contains("a list of messages"), "{told}");
}

#[test]
fn values_are_refused_in_words() {
    for (arguments, words) in [
        (["--device", "cuda"], "did you mean --backend cuda?"),
        (["--device", "first"], "is not the number of a device"),
        (["--temperature", "-1"], "temperature should be 0 or more"),
        (["--seed", "-2"], "`-2` is not a seed"),
        (["--max-tokens", "many"], "such as 8192, 128K (131,072)"),
    ] {
        let told = said(&[&["generate", "x"][..], &arguments].concat());
        assert!(told.contains(words), "{told}");
        assert!(!told.contains("invalid digit"), "{told}");
    }
    let told = refusal(&run(
        &[
            "generate",
            "x",
            "--trace",
            "/dev/null",
            "--trace-kda",
            "3,0",
        ],
        "tiny-a",
    ));
    assert!(
        told.starts_with("error: trace: the KDA layer should be one of"),
        "{told}"
    );
}

#[test]
fn a_context_beyond_the_models_is_told() {
    let output = program(&["inspect", "--context", "128K"], None)
        .output()
        .unwrap();
    let stdout = answer(&output);
    assert!(stdout.contains("1 sequence of 8192 tokens"), "{stdout}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("the model's maximum is 8192 tokens; the sizes are for 8192"),
        "{stderr}"
    );
    let output = program(&["inspect", "--context", "4K"], None)
        .output()
        .unwrap();
    assert!(answer(&output).contains("1 sequence of 4096 tokens"));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn nothing_is_printed_but_what_the_program_says() {
    // Mesa's drivers look for a window system when adapters are listed.
    for folder in [None, Some(""), Some("relative")] {
        let mut command = program(&["devices"], None);
        command.env_remove("XDG_RUNTIME_DIR");
        if let Some(folder) = folder {
            command.env("XDG_RUNTIME_DIR", folder);
        }
        let output = command.output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{folder:?}");
    }
}

#[test]
fn a_chat_through_a_pipe_prints_answers_alone() {
    let home = tempfile::tempdir().unwrap();
    let mut child = program(&["chat", "--backend", "cpu"], None)
        .env("XDG_DATA_HOME", home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = format!("{FACT}\n/usr/bin?\n/undo\n/system\nexit\n");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    let stdout = answer(&output);
    assert_eq!(
        stdout.lines().next(),
        Some("The red box holds 7."),
        "{stdout}"
    );
    assert_eq!(stdout.lines().count(), 2, "{stdout}");
    for notice in [
        "kimi-linear-demo on cpu",
        "It is the demo model",
        "What should I try?",
        " tokens read, ",
        "taken back: /usr/bin?",
        "without a system prompt",
    ] {
        assert!(stderr.contains(notice), "{notice}: {stderr}");
    }
    assert!(
        !format!("{stdout}{stderr}").contains('\u{1b}'),
        "no escapes"
    );
}

#[test]
fn the_list_ends_with_a_verdict() {
    let conformance = |more: &[&str]| {
        let arguments = ["conformance", "--backend", "cpu", "--filter", "rms_norm"];
        answer(
            &program(&[&arguments, more].concat(), None)
                .output()
                .unwrap(),
        )
    };
    let quiet = conformance(&[]);
    let last = quiet.lines().last().unwrap();
    assert!(last.contains("cases, none failed: cpu on "), "{last}");
    assert!(last.ends_with("computes what it should."), "{last}");
    assert!(!quiet.contains("ok  "), "{quiet}");
    let all = conformance(&["--verbose"]);
    let cases: usize = last.split(' ').next().unwrap().parse().unwrap();
    assert_eq!(
        all.lines().filter(|line| line.starts_with("ok ")).count(),
        cases
    );
    let told = said(&[
        "conformance",
        "--backend",
        "cpu",
        "--filter",
        "no such case",
    ]);
    assert!(
        told.contains("no case's name contains `no such case`"),
        "{told}"
    );
}

#[test]
fn bench_says_what_it_can_measure() {
    let told = said(&["bench"]);
    assert!(
        told.contains("bench --shape tiny") && told.contains("bench model"),
        "{told}"
    );
    let told = said(&[
        "bench",
        "kernels",
        "--dry-run",
        "--small",
        "--shape",
        "tiny",
        "--filter",
        "no such kernel",
    ]);
    assert!(
        told.contains("no kernel's and no operation's name contains"),
        "{told}"
    );
}

#[test]
#[cfg(feature = "server")]
fn a_server_that_is_not_there_is_one_cause() {
    // A port that was free just before.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let url = format!("http://127.0.0.1:{port}");
    let told = said(&["bench", "serve", "--url", &url]);
    assert!(
        told.starts_with(&format!("error: cannot reach {url}: Connection refused")),
        "{told}"
    );
    assert!(told.contains("kimi-linear serve"), "{told}");
    assert!(!told.contains("client error"), "{told}");
}

#[test]
fn a_quick_evaluation_says_that_it_is_one() {
    let output = program(&["eval", "--backend", "cpu", "--questions", "1"], None)
        .output()
        .unwrap();
    assert!(answer(&output).contains("recall"));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("1 question of each task and length; --all asks all questions"),
        "{stderr}"
    );
    assert!(!stderr.contains("--data"), "{stderr}");
    let arguments = ["eval", "--backend", "cpu", "--questions", "1"];
    let other = run(&arguments, "tiny-a");
    let stderr = String::from_utf8(other.stderr).unwrap();
    assert!(
        stderr.contains("about the demo model's tasks; --data names others"),
        "{stderr}"
    );
}

#[test]
fn values_of_llama_cpp_and_vllm_mean_what_they_mean_there() {
    let run = ["run", FACT, "--backend", "cpu"];
    let plain = answer(&program(&run, None).output().unwrap());
    for options in [
        &["-n", "-1"][..],
        &["--n-predict", "-1", "--top-k", "-1"],
        &["--temp", "0", "--repeat-penalty", "1.0"],
    ] {
        let output = program(&[&run[..], options].concat(), None).output();
        assert_eq!(answer(&output.unwrap()), plain, "{options:?}");
    }
}

#[test]
fn text_is_given_in_the_same_ways_to_every_command() {
    let ids = |output: &Output| -> Value {
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    };
    for command in [&["tokenize", "--json"][..], &["score", "--json"]] {
        let argument = program(&[command, &[FACT]].concat(), None).output();
        let from_stdin = piped(&[command, &["-f", "-"]].concat(), FACT);
        assert_eq!(ids(&from_stdin), ids(&argument.unwrap()), "{command:?}");
    }
    let option = ["tokenize", "--json", "--text", FACT];
    let option = program(&option, None).output().unwrap();
    let argument = program(&["tokenize", "--json", FACT], None).output();
    assert_eq!(ids(&option), ids(&argument.unwrap()));
    let piped = piped(&["run", "-f", "-"], FACT);
    assert_eq!(answer(&piped), "The red box holds 7.\n");
}

#[cfg(feature = "server")]
#[test]
fn a_model_behind_a_list_of_names_is_no_name() {
    let model = reference("tiny-a");
    let model = model.to_str().unwrap();
    for list in ["--served-model-name", "--allowed-hosts"] {
        let told = said(&["serve", "--port", "0", list, "name", model]);
        assert!(
            told.contains("every word up to the next option")
                && told.contains("put the model first"),
            "{told}"
        );
    }
}

#[cfg(feature = "server")]
#[test]
fn flags_are_under_their_own_heading() {
    let help = answer(&program(&["serve", "--help"], None).output().unwrap());
    let (_, tls) = help.split_once("\nTLS:\n").unwrap();

    let flags = tls
        .lines()
        .map(str::trim)
        .take_while(|line| !line.ends_with(':'));
    let named: Vec<&str> = flags.filter(|line| line.starts_with("--")).collect();
    assert!(named.len() == 4, "{named:?}");
    assert!(
        named.iter().all(|flag| flag.starts_with("--ssl-")),
        "{named:?}"
    );
}

#[test]
fn an_evaluation_that_is_stopped_keeps_what_it_knows() {
    let arguments = ["eval", "--backend", "cpu", "--all", "--max-num-seqs", "1"];
    let mut child = program(&arguments, None)
        .env("KIMI_LINEAR_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // When the model is loaded it accepts requests, and the program Ctrl-C; all questions would take minutes.
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("loaded") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended early");
    }
    std::thread::sleep(std::time::Duration::from_secs(2));
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "it ends by itself: {said}");
    assert!(said.contains("error: stopped after "), "{said}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.starts_with("task "), "{table}");
}

#[test]
fn shells_and_man_know_the_command_line() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = program(&["completions", shell], None).output().unwrap();
        let script = answer(&output);
        assert!(script.contains("kv-cache-dtype"), "{shell}: {script}");
    }
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let to = pages.display().to_string();
    answer(&program(&["man", &to], None).output().unwrap());
    for page in [
        "kimi-linear.1",
        "kimi-linear-run.1",
        "kimi-linear-bench-model.1",
    ] {
        let text = std::fs::read_to_string(pages.join(page)).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}: {text}");
    }
}

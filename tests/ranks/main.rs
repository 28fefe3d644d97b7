//! Ranks in other processes, here in other threads over loopback connections: the bits of ranks in one process, and what
//! happens when a node is lost, is of another model, or is no node.
#![cfg(feature = "transfer")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
#[path = "../common/emulated.rs"]
mod emulated;
#[path = "../common/group.rs"]
mod group;
#[path = "../model/harness.rs"]
mod harness;
mod proxy;

use std::io::Write;
use std::net::TcpStream;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{Fixture, reference};
use group::degrees;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, DrawCapacity, Group, Place, Random, RandomWeight, StepOutput};
use kimi_linear::checkpoint::{Checkpoint, Format};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{Engine, EngineHandle, EngineOptions, Event, Request};
use kimi_linear::error::{BackendError, Error};
use kimi_linear::model::{Model, StepOptions};
use kimi_linear::ranks::{Node, Nodes, identity};
use kimi_linear::transfer::{Identity, Secret, Tls, TlsPem, TransferOptions};
use proxy::Proxy;

const BLOCKS: usize = 8;
const MODEL: &str = "tiny-8";

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

/// Options with a secret, that notice a lost connection soon.
fn options(secret: &[u8]) -> TransferOptions {
    TransferOptions {
        secret: Secret::new(secret).unwrap(),
        heartbeat: Duration::from_millis(200),
        dead_after: Duration::from_secs(5),
        max_record_bytes: 1 << 30,
        ..TransferOptions::default()
    }
}

const SECRET: &[u8] = b"sixteen bytes, or more";

fn opened(name: &str) -> (ModelConfig, Checkpoint) {
    let dir = reference(name);
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    (config, checkpoint)
}

fn identity_of(name: &str, of: [usize; 3], nodes: usize) -> Identity {
    let (config, checkpoint) = opened(name);
    identity(&config, &checkpoint, degrees(of), nodes).unwrap()
}

/// Opens a device for a rank.
type Open = fn(usize) -> Box<dyn Backend>;

/// A node in a thread, which ends when it is dropped and its connection ends.
struct Running {
    stop: Arc<AtomicBool>,
    events: Receiver<String>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Running {
    fn start(
        name: &'static str,
        address: String,
        number: usize,
        ranks: usize,
        identity: Identity,
        secret: &[u8],
    ) -> Self {
        let options = options(secret);
        Self::start_with(name, (address, number, ranks), identity, options)
    }

    fn start_with(
        name: &'static str,
        place: (String, usize, usize),
        identity: Identity,
        options: TransferOptions,
    ) -> Self {
        Self::start_on(name, place, |_| cpu(), identity, options)
    }

    fn start_on(
        name: &'static str,
        (address, number, ranks): (String, usize, usize),
        open: Open,
        identity: Identity,
        options: TransferOptions,
    ) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let (sender, events) = channel();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let (_, checkpoint) = opened(name);
            let mut node = Node {
                address,
                number,
                identity,
                options,
                checkpoint: &checkpoint,
                open: &mut || Ok((0..ranks).map(open).collect()),
            };
            node.serve(&mut |event| {
                let _ = sender.send(event.to_owned());
                match stopped.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })
        });
        Self {
            stop,
            events,
            thread: Some(thread),
        }
    }

    fn end(mut self) -> Result<(), Error> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn listen(same: &Identity, nodes: usize) -> Nodes {
    Nodes::listen("127.0.0.1:0", nodes, same.clone(), &options(SECRET)).unwrap()
}

/// Joins rank 0's own ranks and the nodes' to a group.
fn gather(nodes: Nodes, of: [usize; 3], count: usize) -> Box<dyn Backend> {
    Box::new(gather_on(nodes, of, count, |_| cpu()))
}

/// The same on other devices.
fn gather_on(nodes: Nodes, of: [usize; 3], count: usize, open: Open) -> Group {
    let (config, _) = opened(MODEL);
    let degrees = degrees(of);
    let each = degrees.ranks() / count;
    let mut ranks: Vec<Box<dyn Backend>> = (0..each).map(open).collect();
    ranks.extend(nodes.gather(each, degrees, &mut |_| {}).unwrap());
    Group::new(ranks, degrees, &config).unwrap()
}

fn load(backend: Box<dyn Backend>) -> Model {
    harness::load(MODEL, backend, harness::limits(32, BLOCKS, Dtype::F32))
}

const OPTIONS: StepOptions = StepOptions {
    candidates: 2,
    keep_rows: true,
    probe_hidden: true,
    draws: DrawCapacity::NONE,
};

/// Everything that a step returns for a prompt in two segments and for the tokens after it.
fn run(model: &mut Model) -> Result<Vec<StepOutput>, BackendError> {
    let prompt = Fixture::open("tiny-8/expected.safetensors").ids("prompt.24.tokens");
    let mut step = model.step(model.limits().step, OPTIONS)?;
    let mut outputs = Vec::new();
    for (first, tokens) in [(0, &prompt[..17]), (17, &prompt[17..])] {
        outputs.push(
            step.submit(&harness::batch(tokens, first, BLOCKS))?
                .wait()?,
        );
    }
    for i in 0..6 {
        let last = outputs.last().unwrap().choices.last().unwrap();
        let token = last.candidates[0].0;
        outputs.push(
            step.submit(&harness::batch(&[token], 24 + i, BLOCKS))?
                .wait()?,
        );
    }
    Ok(outputs)
}

#[test]
fn ranks_of_other_processes_have_the_bits_of_ranks_of_one() {
    for (of, count) in [
        ([2, 1, 1], 2),
        ([1, 4, 1], 2),
        ([1, 1, 4], 4),
        ([2, 2, 2], 2),
        ([4, 4, 1], 4),
    ] {
        let expected = run(&mut load(group::group(MODEL, of, cpu))).unwrap();
        let same = identity_of(MODEL, of, count);
        let nodes = listen(&same, count);
        let address = nodes.address().to_string();
        let each = degrees(of).ranks() / count;
        let running: Vec<Running> = (1..count)
            .map(|number| {
                Running::start(MODEL, address.clone(), number, each, same.clone(), SECRET)
            })
            .collect();
        let mut model = load(gather(nodes, of, count));
        let found = run(&mut model).unwrap();
        assert!(found == expected, "{of:?} on {count} nodes");
        frees(&mut model);
        drop(model);
        for node in running {
            node.end().unwrap();
        }
    }
}

/// Pools and weights of all ranks are counted, and freed.
fn frees(model: &mut Model) {
    let before = model.memory();
    let (states, latents) = (model.states().layout, model.latents().layout);
    let backend = model.backend();
    let states = backend.state_pool(states).unwrap();
    let latents = backend.latent_pool(latents).unwrap();
    let weight = backend.random_weight(RandomWeight {
        name: "freed".to_owned(),
        stack: 1,
        rows: 16,
        columns: 24,
        format: Format::BF16,
        random: Random::named("freed", 1, 0),
        place: Place::default(),
    });
    let weight = weight.unwrap();
    let made = backend.memory();
    assert_eq!(made.states, 2 * before.states);
    assert_eq!(made.latents, 2 * before.latents);
    assert!(made.weights >= before.weights + 2 * 16 * 24);
    backend.release(weight).unwrap();
    backend.release_states(states).unwrap();
    backend.release_latents(latents).unwrap();
    assert_eq!(backend.memory(), before);
    assert!(backend.release(weight).is_err());
}

/// Waits until all nodes of a model that lost one are there again.
fn recover(model: &mut Model) {
    let began = Instant::now();
    while let Err(error) = model.backend().recover() {
        assert!(matches!(error, BackendError::Lost { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(60), "{error}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Devices of several nodes join each other and exchange results by themselves, several of one node too. When a node is lost nobody
/// waits for it, and when it is back they join again.
#[cfg(feature = "cuda")]
#[test]
fn devices_of_several_nodes_exchange_results() {
    fn open(index: usize) -> Box<dyn Backend> {
        emulated::open_at(index, &emulated::ORDERS[..1])
    }

    for of in [[2, 1, 1], [4, 4, 1], [2, 1, 2]] {
        let load = |group: Box<dyn Backend>| {
            let limits = harness::limits(32, BLOCKS, group.device().cache);
            harness::load(MODEL, group, limits)
        };
        let alike = || emulated::open(&emulated::ORDERS[..1]);
        let expected = run(&mut load(group::group(MODEL, of, alike))).unwrap();
        let same = identity_of(MODEL, of, 2);
        let nodes = listen(&same, 2);
        let proxy = Proxy::start(nodes.address());
        let place = (proxy.address(), 1, degrees(of).ranks() / 2);
        let node = Running::start_on(MODEL, place, open, same, options(SECRET));
        let group = gather_on(nodes, of, 2, open);
        assert!(group.exchanges_on_devices(), "{of:?}");
        let mut model = load(Box::new(group));
        assert!(run(&mut model).unwrap() == expected, "{of:?}: other bits");
        // Compiled before: this process's ranks wait for those of the node, which do not come.
        let mut step = model.step(model.limits().step, OPTIONS).unwrap();
        proxy.cut();
        let submitted = step.submit(&harness::batch(&[1, 2, 3], 0, BLOCKS));
        let error = submitted.and_then(|ticket| ticket.wait()).unwrap_err();
        assert!(
            matches!(error, BackendError::Lost { .. }),
            "{of:?}: {error}"
        );
        drop(step);
        recover(&mut model);
        assert!(
            run(&mut model).unwrap() == expected,
            "{of:?}: after it came back"
        );
        drop(model);
        node.end().unwrap();
    }
}

/// A connection that is cut fails the step with a sentence. The node comes back without being started again, and makes what it
/// had made before.
#[test]
fn a_lost_node_fails_the_step_and_comes_back() {
    let of = [2, 1, 1];
    let expected = run(&mut load(group::group(MODEL, of, cpu))).unwrap();
    let same = identity_of(MODEL, of, 2);
    let nodes = listen(&same, 2);
    let proxy = Proxy::start(nodes.address());
    let node = Running::start(MODEL, proxy.address(), 1, 1, same, SECRET);
    let mut model = load(gather(nodes, of, 2));
    // Pools of other sizes are made again in these.
    model.resize(5, BLOCKS + 4).unwrap();
    model.resize(3, BLOCKS + 1).unwrap();
    let memory = model.memory();
    let cut = |proxy: &Proxy| {
        proxy.stall();
        proxy.cut();
    };
    for (how, cut) in [("cut", cut as fn(&Proxy)), ("stalled", Proxy::stall)] {
        assert!(run(&mut model).unwrap() == expected, "before it is {how}");
        cut(&proxy);
        let error = run(&mut model).err().unwrap();
        assert!(matches!(error, BackendError::Lost { .. }), "{how}: {error}");
        assert!(
            error.to_string().contains("the connection to node 1 ended"),
            "{how}: {error}"
        );
        // Later calls fail at once, also once the node is back: its states are not those of before.
        let error = model.backend().recover().unwrap_err().to_string();
        assert!(error.contains("it has not connected again yet"), "{error}");
        proxy.mend();
        thread::sleep(Duration::from_secs(1));
        assert!(run(&mut model).is_err());
        recover(&mut model);
    }
    assert!(run(&mut model).unwrap() == expected, "after it came back");
    assert_eq!(model.memory(), memory);
    drop(model);
    assert!(
        node.events
            .try_iter()
            .any(|event| event.contains("connecting again"))
    );
    node.end().unwrap();
}

/// An engine fails its requests when a node is lost, and goes on when the node is back: with the same tokens, and with none that
/// were cached before.
#[test]
fn an_engine_goes_on_when_its_node_is_back() {
    let of = [2, 1, 1];
    let same = identity_of(MODEL, of, 2);
    let nodes = listen(&same, 2);
    let proxy = Proxy::start(nodes.address());
    let node = Running::start(MODEL, proxy.address(), 1, 1, same, SECRET);
    let model = load(gather(nodes, of, 2));
    let engine = EngineHandle::start(Engine::new(model, EngineOptions::default())).unwrap();
    let prompt = Fixture::open("tiny-8/expected.safetensors").ids("prompt.24.tokens");
    let ask = || {
        let answer = engine.answer(Request::new(prompt.clone(), 6));
        let (mut tokens, mut failed) = (Vec::new(), None);
        while let Some(event) = answer.next() {
            match event {
                Event::Token { id, .. } => tokens.push(id),
                Event::Failed(error) => failed = Some(error.to_string()),
                _ => {}
            }
        }
        failed.map_or(Ok(tokens), Err)
    };
    let expected = ask().unwrap();
    assert_eq!(expected.len(), 6);
    for cut in [Proxy::cut as fn(&Proxy), Proxy::stall, Proxy::cut] {
        cut(&proxy);
        let error = ask().unwrap_err();
        assert!(error.contains("the connection to node 1 ended"), "{error}");
        proxy.mend();
        let began = Instant::now();
        let found = loop {
            match ask() {
                Ok(tokens) => break tokens,
                Err(error) => assert!(error.contains("the connection to node 1 ended"), "{error}"),
            }
            assert!(began.elapsed() < Duration::from_secs(60), "it is not back");
            thread::sleep(Duration::from_millis(50));
        };
        assert_eq!(found, expected);
    }
    drop(engine);
    node.end().unwrap();
}

/// A node that comes back with other devices is not taken.
#[test]
fn a_node_with_other_devices_does_not_come_back() {
    let of = [2, 1, 1];
    let same = identity_of(MODEL, of, 2);
    let nodes = listen(&same, 2);
    let proxy = Proxy::start(nodes.address());
    let node = Running::start(MODEL, proxy.address(), 1, 1, same.clone(), SECRET);
    let mut model = load(gather(nodes, of, 2));
    node.stop.store(true, Ordering::Relaxed);
    proxy.cut();
    node.end().unwrap();
    let other = Running::start(MODEL, proxy.address(), 1, 2, same, SECRET);
    proxy.mend();
    let began = Instant::now();
    loop {
        let error = model.backend().recover().unwrap_err().to_string();
        if error.contains("it came back, but it has other devices than before") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{error}");
        thread::sleep(Duration::from_millis(20));
    }
    drop(model);
    other.end().unwrap();
}

/// TLS between nodes: those with a certificate that node 0 trusts join, others do not.
#[test]
fn nodes_join_with_tls() {
    let of = [2, 1, 1];
    let expected = run(&mut load(group::group(MODEL, of, cpu))).unwrap();
    let same = identity_of(MODEL, of, 2);
    let made = || {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    };
    let (node_0, node_1, stranger) = (made(), made(), made());
    let with = |own: &(String, String), other: &(String, String)| {
        let pem = TlsPem {
            certificate: Some(own.0.as_bytes()),
            key: Some(own.1.as_bytes()),
            ca: Some(other.0.as_bytes()),
            server_name: None,
        };
        TransferOptions {
            tls: Some(Tls::new(pem).unwrap()),
            ..options(SECRET)
        }
    };
    let listening = with(&node_0, &node_1);
    let nodes = Nodes::listen("127.0.0.1:0", 2, same.clone(), &listening).unwrap();
    let address = nodes.address().to_string();
    let start = |options| {
        let node = (address.clone(), 1, 1);
        Running::start_with(MODEL, node, same.clone(), options)
    };
    // One without TLS, one with a certificate that is not trusted, and one that does not trust node 0.
    let others = [
        start(options(SECRET)),
        start(with(&stranger, &node_0)),
        start(with(&node_1, &stranger)),
    ];
    thread::sleep(Duration::from_secs(2));
    let good = start(with(&node_1, &node_0));
    let mut model = load(gather(nodes, of, 2));
    assert!(run(&mut model).unwrap() == expected);
    for other in others {
        let joined = (other.events.try_iter()).any(|event| event.contains("connected to"));
        assert!(!joined);
        let _ = other.end();
    }
    drop(model);
    good.end().unwrap();
}

#[test]
fn strangers_do_not_join() {
    let of = [2, 1, 1];
    let same = identity_of(MODEL, of, 2);
    let nodes = listen(&same, 2);
    let address = nodes.address();
    // Bytes that are no handshake, and a connection that says nothing.
    let mut garbage = TcpStream::connect(address).unwrap();
    garbage.write_all(&[7; 4096]).unwrap();
    let _silent = TcpStream::connect(address).unwrap();
    let address = address.to_string();
    // A node with another secret, one of another model, and one with a number that is not expected.
    let other = Running::start(
        MODEL,
        address.clone(),
        1,
        1,
        same.clone(),
        b"another secret of some length",
    );
    let foreign = Running::start(
        "tiny-a",
        address.clone(),
        1,
        1,
        identity_of("tiny-a", of, 2),
        SECRET,
    );
    let fifth = Running::start(MODEL, address.clone(), 5, 1, same.clone(), SECRET);
    let good = thread::spawn({
        let address = address.clone();
        move || {
            thread::sleep(Duration::from_secs(3));
            Running::start(MODEL, address, 1, 1, same, SECRET)
        }
    });
    let mut model = load(gather(nodes, of, 2));
    run(&mut model).unwrap();
    let refused = |node: Running| {
        node.thread
            .as_ref()
            .is_some_and(JoinHandle::is_finished)
            .then(|| node.end())
    };
    let error = refused(foreign).expect("it ended").unwrap_err().to_string();
    assert!(
        error.contains("configuration") || error.contains("fingerprint"),
        "{error}"
    );
    let error = refused(other).expect("it ended").unwrap_err().to_string();
    assert!(error.contains("secret"), "{error}");
    drop(model);
    good.join().unwrap().end().unwrap();
    fifth.end().unwrap();
}

/// A group with another number of ranks than the node has is refused.
#[test]
fn a_node_with_another_number_of_ranks_is_refused() {
    let of = [2, 1, 1];
    let same = identity_of(MODEL, of, 2);
    let nodes = listen(&same, 2);
    let address = nodes.address().to_string();
    let node = Running::start(MODEL, address, 1, 3, same, SECRET);
    let error = nodes
        .gather(1, degrees(of), &mut |_| {})
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        error,
        "several devices: the number of a node's ranks should be 1, but is 3 (node 1)"
    );
    node.end().unwrap();
}

//! Transfers while pools change their size: slots and blocks that are sent or filled move, and an import that has to give way has its
//! prompt computed here.

use std::ops::ControlFlow;
use std::sync::mpsc;

use kimi_linear::cache::LayerRecord;
use kimi_linear::engine::{EngineHandle, Event, RequestId, Sink};
use pollster::block_on;

use crate::engine_harness::{Outcomes, answer, request, take, tokens};
use crate::{BACKENDS, cpu, exported, further, on, outcome, prompt};

/// Sizes that pools get in turn; every one holds the longest sequence here.
const SIZES: [(usize, usize); 5] = [(3, 13), (7, 60), (2, 14), (5, 40), (4, 20)];

/// The records by tensor, layer and position.
fn sorted(mut records: Vec<LayerRecord>) -> Vec<LayerRecord> {
    records.sort_by_key(|it| (it.tensor, it.layer, it.positions.start, it.heads.start));
    records
}

/// A slow reader, whose parts wait on the device while they move.
#[test]
fn an_export_is_the_same_whatever_the_size_of_pools() {
    for (name, open) in BACKENDS {
        let known = sorted(exported(on(*open, "tiny-a")).1);
        let mut engine = on(*open, "tiny-a");
        // The low places are taken first, and free when the export has the others.
        let before = request(tokens(5, 150), 2);
        let _ = answer(&mut engine, before);
        let export = request(prompt(), 0);
        let mut stream = engine.export(RequestId(1), export, 1).unwrap();
        let mut found = Vec::new();
        let mut sizes = SIZES.into_iter().cycle();
        loop {
            let more = block_on(engine.step());
            if found.is_empty() {
                engine.clear_cache();
            }
            let (slots, blocks) = sizes.next().unwrap();
            block_on(engine.resize(slots, blocks)).unwrap();
            engine.send_exports();
            let record = stream.try_next().map(|record| record.unwrap());
            let done = !more && record.is_none();
            found.extend(record);
            if done {
                break;
            }
        }
        assert!(stream.hand_off().is_some(), "{name}");
        assert!(sorted(found) == known, "{name}: other records");
        engine.clear_cache();
        assert_eq!(engine.held(), (0, 0), "{name}");
    }
}

#[test]
fn an_import_is_the_same_whatever_the_size_of_pools() {
    for (name, open) in BACKENDS {
        let expected = answer(&mut on(*open, "tiny-a"), further());
        let (header, records) = exported(on(*open, "tiny-a"));
        let mut engine = on(*open, "tiny-a");
        let _ = answer(&mut engine, request(tokens(5, 150), 2));
        let handle = EngineHandle::start(engine).unwrap();
        let mut import = handle.import(header, further()).unwrap();
        handle.clear_cache().unwrap();
        for (record, (slots, blocks)) in records.iter().zip(SIZES.into_iter().cycle()) {
            import.put(record).unwrap();
            handle.resize(slots, blocks).unwrap();
        }
        let found = outcome(&import.finish(None).unwrap());
        assert_eq!(found.said(), expected.said(), "{name}");
    }
}

/// Of two imports the later one gives way: what is sent for it is refused, and its answer comes from its tokens.
#[test]
fn an_import_without_room_is_computed_here() {
    let expected = answer(&mut on(cpu, "tiny-a"), further());
    let (header, records) = exported(on(cpu, "tiny-a"));
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let mut first = handle.import(header.clone(), further()).unwrap();
    let (some, rest) = records.split_at(records.len() / 2);
    some.iter().for_each(|record| first.put(record).unwrap());
    let (sender, events) = mpsc::channel();
    let sink: Sink = Box::new(move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    });
    let id = handle.import_to(header.clone(), further(), sink);
    let have = events.iter().find_map(|event| match event {
        Event::Reserved { have } => Some(have),
        _ => None,
    });
    let mut second = handle.import_writer(id, header, have.unwrap()).unwrap();
    some.iter().for_each(|record| second.put(record).unwrap());
    handle.resize(3, 13).unwrap();
    let refused = rest.iter().find_map(|record| second.put(record).err());
    let refused = refused.unwrap().to_string();
    assert!(refused.contains("does not wait for caches"), "{refused}");
    rest.iter().for_each(|record| first.put(record).unwrap());
    let found = outcome(&first.finish(None).unwrap());
    assert_eq!(found.said(), expected.said());
    let mut outcomes = Outcomes::new();
    for event in events {
        let ended = matches!(event, Event::Finished { .. } | Event::Failed(_));
        take([(id, event)], &mut outcomes);
        if ended {
            break;
        }
    }
    assert_eq!(outcomes[&(id, 0)].tokens, expected.tokens);
}

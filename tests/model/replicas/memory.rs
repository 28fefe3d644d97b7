//! What devices have in their memory: weights once for all replicas, parts of experts, caches with their layers; and everything is
//! as it was when a change has been undone.

use super::*;
use kimi_linear::backend::MemoryUse;
use kimi_linear::backend::dry::DryBackend;
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::Dtype;
use kimi_linear::model::Limits;

/// Bytes of all weights, and those of each layer's experts.
fn sizes() -> (u64, Vec<u64>) {
    let checkpoint = Checkpoint::open(&reference("tiny-8"), &config()).unwrap();
    let layers = checkpoint.layer_bytes(&config());
    let experts = layers.iter().map(|layer| layer.experts).collect();
    (checkpoint.total_bytes(), experts)
}

fn weights(replicas: &Replicas) -> [u64; 2] {
    [0, 1].map(|device| replicas.memory(device).weights)
}

/// Bytes of caches on both devices.
fn caches(replicas: &Replicas) -> [[u64; 2]; 2] {
    [0, 1].map(|device| {
        let MemoryUse {
            states, latents, ..
        } = replicas.memory(device);
        [states, latents]
    })
}

#[test]
fn weights_are_there_once_and_freed_with_their_last_use() {
    let (all, expert_bytes) = sizes();
    let layer_bytes = Checkpoint::open(&reference("tiny-8"), &config())
        .unwrap()
        .layer_bytes(&config());
    let layer_bytes: Vec<u64> = layer_bytes.iter().map(|it| it.rest + it.experts).collect();
    assert_eq!(layer_bytes.iter().sum::<u64>(), all);
    let half: u64 = expert_bytes.iter().sum::<u64>() / 2;
    let replicas = on_cpus(2);
    let mut models = [model(&replicas, 0), model(&replicas, 1)];
    let before = caches(&replicas);
    assert_eq!(weights(&replicas), [all, all]);
    // Experts: while one replica has dropped its half and the other has not, both devices have half a layer too much.
    for layer in 0..LAYERS {
        for replica in 0..2 {
            let home = home(replica, &[0, 1]);
            let backend = models[replica].backend();
            backend.place(layer, &home, Caches::Keep).unwrap();
        }
        let dropped: u64 = expert_bytes[..=layer].iter().sum::<u64>() / 2;
        assert_eq!(weights(&replicas), [all - dropped, all - dropped]);
        assert_eq!(caches(&replicas), before);
    }
    assert_eq!(weights(&replicas), [all - half, all - half]);
    // One at home: it needs all of its own, and the other still has its halves on both.
    place(&mut models[0], &whole(0), Caches::Keep);
    assert_eq!(weights(&replicas), [all + half, all - half]);
    place(&mut models[1], &whole(1), Caches::Keep);
    assert_eq!(weights(&replicas), [all, all]);
    // Layers: each device has those of both replicas, and their caches.
    for replica in 0..2 {
        place(&mut models[replica], &layers(2), Caches::Keep);
    }
    let first: u64 = layer_bytes[..2].iter().sum();
    assert_eq!(weights(&replicas), [first, all - first]);
    let [states, latents] = before[0];
    assert_eq!(
        caches(&replicas),
        [[2 * 2 * states / 3, 0], [2 * states / 3, 2 * latents],]
    );
    for replica in 0..2 {
        place(&mut models[replica], &whole(replica), Caches::Keep);
    }
    assert_eq!(
        (weights(&replicas), caches(&replicas)),
        ([all, all], before)
    );
    // A replica that ends leaves what others use.
    place(&mut models[0], &layers(2), Caches::Keep);
    let [one, other] = models;
    drop(one);
    assert_eq!(weights(&replicas), [0, all]);
    assert_eq!(caches(&replicas), [[0, 0], before[1]]);
    drop(other);
    assert_eq!(
        (weights(&replicas), caches(&replicas)),
        ([0, 0], [[0, 0], [0, 0]])
    );
    // And begins again.
    let again = model(&replicas, 1);
    assert_eq!(
        (weights(&replicas), again.memory().weights),
        ([0, all], all)
    );
}

/// A weight that is released and a step that still uses it: the step keeps it.
#[test]
fn a_released_weight_stays_for_steps_that_use_it() {
    let (all, expert_bytes) = sizes();
    let replicas = on_cpus(2);
    let mut models = [model(&replicas, 0), model(&replicas, 1)];
    let step = models[0].step(models[0].limits().step, ALL).unwrap();
    for replica in 0..2 {
        place(
            &mut models[replica],
            &experts(replica, &[0, 1]),
            Caches::Keep,
        );
    }
    let half: u64 = expert_bytes.iter().sum::<u64>() / 2;
    assert_eq!(weights(&replicas), [all + half, all - half]);
    drop(step);
    assert_eq!(weights(&replicas), [all - half, all - half]);
}

/// Activations on another device are made when a program needs them there, and stay.
#[test]
fn activations_are_made_where_programs_need_them() {
    let replicas = on_cpus(2);
    let mut model = model(&replicas, 0);
    let activations = |device: usize| replicas.memory(device).activations;
    let home = activations(0);
    assert_eq!(home, model.activation_bytes());
    assert_eq!(activations(1), 0);
    let compile = |model: &mut Model| drop(model.step(model.limits().step, ALL).unwrap());
    compile(&mut model);
    place(&mut model, &experts(0, &[0, 1]), Caches::Keep);
    assert_eq!([activations(0), activations(1)], [home, 0]);
    // The rows that experts read, their ids, and their results.
    compile(&mut model);
    let rows = 4 * 32 * 3 * 64;
    assert_eq!(activations(0), home + rows);
    assert_eq!(activations(1), 4 * 32 * (64 + 3) + rows);
    let before = [activations(0), activations(1)];
    place(&mut model, &whole(0), Caches::Keep);
    compile(&mut model);
    place(&mut model, &experts(0, &[1, 0]), Caches::Keep);
    compile(&mut model);
    assert_eq!([activations(0), activations(1)], before);
}

/// The published model without memory: what a dropped form frees.
#[test]
fn the_published_model_frees_what_was_predicted() {
    let config = ModelConfig::published().unwrap();
    let expert_bytes: u64 = config.expert_bytes(Dtype::Bf16).iter().sum();
    let all = config.weight_bytes(Dtype::Bf16);
    let devices: Vec<Box<dyn Backend>> =
        vec![Box::new(DryBackend::new()), Box::new(DryBackend::new())];
    let replicas = Replicas::new(devices, &config).unwrap();
    let mut models = [0, 1].map(|replica| {
        let backend = replicas.backend(replica);
        Model::random(&config, 0, backend, Limits::smallest(), &mut |_| {}).unwrap()
    });
    assert_eq!(weights(&replicas), [all, all]);
    let layers = config.layers.len();
    for layer in 0..layers {
        for replica in 0..2 {
            let home = home(replica, &[0, 1]);
            let backend = models[replica].backend();
            backend.place(layer, &home, Caches::Discard).unwrap();
        }
    }
    assert_eq!(weights(&replicas), [all - expert_bytes / 2; 2]);
    for layer in 0..layers {
        for model in &mut models {
            let home = LayerHome::whole(usize::from(layer >= 13));
            model
                .backend()
                .place(layer, &home, Caches::Discard)
                .unwrap();
        }
    }
    assert_eq!(weights(&replicas).iter().sum::<u64>(), all);
}

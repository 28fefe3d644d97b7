//! The client over an engine that plays a script in the place of Dynamo's pipeline.

mod played;

use std::ops::ControlFlow;
use std::sync::atomic::AtomicUsize;

use dynamo_backend_common::{BackendError, DynamoError, ErrorType};
use kimi_linear::engine::{Event, FinishReason, Scored, TokenLogprobs, Usage};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use self::played::{OneWay, Played, Step, Taken};
use super::*;
use crate::wire;

struct Setup {
    played: Arc<Played>,
    engine: RoutedEngine,
    totals: Arc<Totals>,
}

impl Setup {
    fn new(scripts: Vec<Taken>) -> Self {
        Self::limited(scripts, Limits::default().migrations)
    }

    /// Workers that are lost are replaced this often.
    fn limited(scripts: Vec<Taken>, migrations: u32) -> Self {
        let played = Arc::new(Played {
            scripts: Mutex::new(scripts.into()),
            ..Played::default()
        });
        let totals = Arc::new(Totals::default());
        let route = Arc::new(OneWay(Some(played.clone())));
        let limits = Limits {
            migrations,
            ..Limits::default()
        };
        let engine = RoutedEngine::new(route, limits, Arc::clone(&totals), Handle::current());
        Self {
            played,
            engine,
            totals,
        }
    }

    fn submit(&self, request: Request) -> (RequestId, UnboundedReceiver<Event>) {
        self.submit_to(request, |_| ControlFlow::Continue(()))
    }

    fn submit_to(
        &self,
        request: Request,
        mut client: impl FnMut(&Event) -> ControlFlow<()> + Send + 'static,
    ) -> (RequestId, UnboundedReceiver<Event>) {
        let (sender, events) = unbounded_channel();
        let sink: Sink = Box::new(move |event| {
            let flow = client(&event);
            sender.send(event).unwrap();
            flow
        });
        let ids = self.engine.submit_all(vec![(request, sink)]);
        (ids[0], events)
    }

    /// All events of a request.
    async fn events(&self, request: Request) -> Vec<Event> {
        let (_, events) = self.submit(request);
        all(events).await
    }

    fn is_stopped(&self, index: usize) -> bool {
        self.played.contexts.lock().unwrap()[index].is_stopped()
    }

    fn idle(&self) -> bool {
        self.engine.client.active().is_empty() && self.totals.counted().running == 0
    }
}

async fn all(mut events: UnboundedReceiver<Event>) -> Vec<Event> {
    let mut found = Vec::new();
    while let Some(event) = events.recv().await {
        found.push(event);
    }
    found
}

fn request(max_tokens: usize) -> Request {
    Request::new(vec![1, 2, 3, 4, 5], max_tokens)
}

fn token(id: u32) -> Step {
    Step::Event(Event::Token {
        sample: 0,
        id,
        logprobs: None,
    })
}

fn progress(done: usize, cached: usize) -> Step {
    Step::Event(Event::Prefill { done, cached })
}

fn finished(reason: FinishReason) -> Step {
    Step::Event(Event::Finished {
        sample: 0,
        reason,
        stop_token: None,
        usage: Usage::default(),
    })
}

/// An answer of these tokens.
fn answer(tokens: &[u32]) -> Taken {
    let steps = [progress(5, 2)].into_iter();
    let steps = steps.chain(tokens.iter().map(|id| token(*id)));
    Taken::Begins(steps.chain([finished(FinishReason::Length)]).collect())
}

fn error(kind: ErrorType) -> DynamoError {
    let error = DynamoError::builder().error_type(kind);
    error
        .message("it says so")
        .public_message("it says so")
        .build()
}

/// The tokens of one answer.
fn tokens(events: &[Event], of: usize) -> Vec<u32> {
    let tokens = events.iter().filter_map(|event| match event {
        Event::Token { sample, id, .. } if *sample == of => Some(*id),
        _ => None,
    });
    tokens.collect()
}

/// The end of one answer.
fn end(events: &[Event], of: usize) -> Option<(FinishReason, Usage)> {
    events.iter().find_map(|event| match event {
        Event::Finished {
            sample,
            reason,
            usage,
            ..
        } if *sample == of => Some((*reason, *usage)),
        _ => None,
    })
}

/// The error that a request ends with.
fn failure(events: &[Event]) -> EngineError {
    match events.last() {
        Some(Event::Failed(error)) => match &**error {
            kimi_linear::Error::Engine(error) => error.clone(),
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

fn usage(cached_tokens: usize, generated_tokens: usize) -> Usage {
    Usage {
        prompt_tokens: 5,
        cached_tokens,
        generated_tokens,
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_come_with_their_log_probabilities_and_are_counted() {
    let logprobs = TokenLogprobs {
        logprob: -0.1_f32 / 3.0,
        top: vec![(8, -0.25), (9, f32::NEG_INFINITY)],
    };
    let setup = Setup::new(vec![Taken::Begins(vec![
        progress(3, 2),
        progress(5, 2),
        Step::Event(Event::Token {
            sample: 0,
            id: 8,
            logprobs: Some(logprobs.clone()),
        }),
        token(9),
        Step::Event(Event::Finished {
            sample: 0,
            reason: FinishReason::Stop,
            stop_token: Some(7),
            usage: Usage::default(),
        }),
    ])]);
    let events = setup.events(request(9)).await;
    assert!(matches!(events[0], Event::Queued { .. }), "{events:?}");
    assert!(matches!(events[2], Event::Prefill { done: 5, cached: 2 }));
    let Event::Token {
        logprobs: Some(found),
        ..
    } = &events[3]
    else {
        panic!("{events:?}");
    };
    assert_eq!(*found, logprobs);
    let Event::Finished {
        stop_token: Some(7),
        reason: FinishReason::Stop,
        usage: found,
        ..
    } = &events[5]
    else {
        panic!("{events:?}");
    };
    assert_eq!(*found, usage(2, 2));
    assert_eq!(events.len(), 6);
    let sent = setup.played.requests.lock().unwrap()[0].clone();
    assert_eq!(sent.stop_conditions.max_tokens, Some(9));
    let allowed = sent.routing.unwrap().allowed_worker_ids.unwrap();
    assert_eq!(allowed, HashSet::from([7]));
    let counted = setup.totals.counted();
    assert_eq!((counted.finished, counted.generated_tokens), (1, 2));
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn several_answers_are_as_many_requests_and_look_like_one() {
    let setup = Setup::new(vec![
        answer(&[10, 11]),
        answer(&[20]),
        answer(&[30, 31, 32]),
    ]);
    let several = Request {
        samples: 3,
        first_sample: 4,
        ..request(9)
    };
    let events = setup.events(several).await;
    assert!(matches!(events[0], Event::Queued { .. }));
    let queued = events
        .iter()
        .filter(|it| matches!(it, Event::Queued { .. }));
    assert_eq!(queued.count(), 1);
    let progress = events
        .iter()
        .filter(|it| matches!(it, Event::Prefill { .. }));
    assert_eq!(progress.count(), 1);
    for (sample, expected) in [(0, &[10, 11][..]), (1, &[20]), (2, &[30, 31, 32])] {
        assert_eq!(tokens(&events, sample), expected);
        let (reason, found) = end(&events, sample).unwrap();
        assert_eq!(reason, FinishReason::Length);
        assert_eq!(found, usage(2, expected.len()));
    }
    let requests = setup.played.requests.lock().unwrap();
    let mut firsts = Vec::new();
    for request in requests.iter() {
        let remote = wire::remote(request).unwrap().unwrap();
        let sent = wire::engine_request(request, remote, &|_| Err("none".to_owned())).unwrap();
        assert_eq!(sent.samples, 1);
        firsts.push(sent.first_sample);
    }
    assert_eq!(firsts, [4, 5, 6]);
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_breaks_ends_its_answer_there() {
    let steps = vec![
        progress(5, 0),
        token(1),
        token(2),
        token(3),
        Step::UntilStopped,
    ];
    let setup = Setup::new(vec![Taken::Begins(steps)]);
    let seen = AtomicUsize::new(0);
    let (_, events) = setup.submit_to(request(99), move |event| {
        let is_token = matches!(event, Event::Token { .. });
        let seen = seen.fetch_add(usize::from(is_token), Ordering::Relaxed);
        match is_token && seen == 1 {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    let events = all(events).await;
    assert_eq!(tokens(&events, 0), [1, 2]);
    assert_eq!(end(&events, 0), Some((FinishReason::Stop, usage(0, 2))));
    assert!(matches!(events.last(), Some(Event::Finished { .. })));
    assert!(setup.is_stopped(0));
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_request_stops_its_workers() {
    let steps = vec![progress(5, 1), token(1), Step::UntilStopped];
    let setup = Setup::new(vec![Taken::Begins(steps.clone()), Taken::Begins(steps)]);
    let several = Request {
        samples: 2,
        ..request(99)
    };
    let (id, mut events) = setup.submit(several);
    let mut found = Vec::new();
    while tokens(&found, 0).is_empty() || tokens(&found, 1).is_empty() {
        found.push(events.recv().await.unwrap());
    }
    setup.engine.cancel(id);
    found.extend(all(events).await);
    for sample in 0..2 {
        let expected = usage(1, 1);
        assert_eq!(
            end(&found, sample),
            Some((FinishReason::Cancelled, expected))
        );
        assert!(setup.is_stopped(sample));
    }
    let counted = setup.totals.counted();
    assert_eq!((counted.cancelled, counted.finished), (1, 0));
    // One that is not there, or has ended, cannot be cancelled.
    setup.engine.cancel(id);
    setup.engine.cancel(RequestId(999));
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn a_request_is_cancelled_while_no_worker_has_taken_it() {
    let setup = Setup::new(vec![Taken::Silent]);
    let (id, mut events) = setup.submit(request(9));
    while setup.played.contexts.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    setup.engine.cancel(id);
    assert!(matches!(events.recv().await, Some(Event::Queued { .. })));
    let found = all(events).await;
    assert_eq!(end(&found, 0), Some((FinishReason::Cancelled, usage(0, 0))));
    assert!(setup.is_stopped(0));
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_fails_before_it_counts_as_taken() {
    let invalid = error(ErrorType::Backend(BackendError::InvalidArgument));
    let setup = Setup::new(vec![Taken::Refuses(invalid)]);
    let events = setup.events(request(9)).await;
    assert_eq!(events.len(), 1);
    let refused = failure(&events);
    assert!(
        matches!(&refused, EngineError::Refused { reason } if reason == "it says so"),
        "{refused:?}"
    );
    // A worker that is full says so in its first chunk, and others are asked.
    let full = || Taken::Begins(vec![Step::Fails(error(ErrorType::WorkerOverloaded))]);
    let setup = Setup::new(vec![full(), answer(&[1])]);
    assert_eq!(tokens(&setup.events(request(9)).await, 0), [1]);
    let setup = Setup::new((0..4).map(|_| full()).collect());
    let events = setup.events(request(9)).await;
    assert_eq!(events.len(), 1);
    assert!(matches!(failure(&events), EngineError::QueueFull { .. }));
    assert_eq!(setup.totals.counted().failed, 1);
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn an_error_in_the_middle_and_a_stream_that_just_ends_fail_the_request() {
    let lost = Step::Fails(error(ErrorType::Disconnected));
    for last in [lost, Step::Broken, finished(FinishReason::Cancelled)] {
        let steps = vec![progress(5, 0), token(1), last];
        let other = vec![progress(5, 0), token(2), Step::UntilStopped];
        let setup = Setup::limited(vec![Taken::Begins(other), Taken::Begins(steps)], 0);
        let several = Request {
            samples: 2,
            ..request(9)
        };
        let events = setup.events(several).await;
        assert_eq!(tokens(&events, 1), [1]);
        assert!(matches!(failure(&events), EngineError::Unavailable { .. }));
        // No event follows, and the other answer's worker stops.
        assert_eq!(end(&events, 0), None);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(setup.is_stopped(0));
        assert!(setup.idle());
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_lost_is_replaced_and_the_answer_goes_on() {
    for lost in [
        Step::Fails(error(ErrorType::Disconnected)),
        Step::Broken,
        finished(FinishReason::Cancelled),
    ] {
        let first = Taken::Begins(vec![progress(5, 2), token(1), token(2), lost]);
        let rest = vec![progress(7, 6), token(3), finished(FinishReason::Length)];
        // Nor is the first one tried that takes it on.
        let gone = Taken::Refuses(error(ErrorType::CannotConnect));
        let setup = Setup::new(vec![first, gone, Taken::Begins(rest)]);
        let events = setup.events(request(3)).await;
        assert_eq!(tokens(&events, 0), [1, 2, 3]);
        assert_eq!(end(&events, 0), Some((FinishReason::Length, usage(2, 3))));
        // The client is not told of the second prefill.
        assert_eq!(events.len(), 6, "{events:?}");
        let requests = setup.played.requests.lock().unwrap();
        for request in &requests[1..] {
            assert_eq!(*request.token_ids, [1, 2, 3, 4, 5, 1, 2]);
            assert_eq!(request.stop_conditions.max_tokens, Some(1));
            let remote = wire::remote(request).unwrap().unwrap();
            assert_eq!(remote.prompt_tokens, 5);
        }
        // Dynamo's router of prefills may know the lost attempt's id still.
        let contexts = setup.played.contexts.lock().unwrap();
        let ids: HashSet<_> = contexts.iter().map(|context| context.id()).collect();
        assert_eq!(ids.len(), 3);
        assert!(contexts[0].is_stopped());
        assert_eq!(setup.totals.counted().migrated, 1);
        assert!(setup.idle());
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_which_only_the_end_was_lost_is_complete() {
    let steps = vec![progress(5, 2), token(1), token(2), Step::Broken];
    let setup = Setup::new(vec![Taken::Begins(steps)]);
    let events = setup.events(request(2)).await;
    assert_eq!(tokens(&events, 0), [1, 2]);
    assert_eq!(end(&events, 0), Some((FinishReason::Length, usage(2, 2))));
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn an_answer_goes_on_only_so_often() {
    let breaks = |id| Taken::Begins(vec![progress(5, 0), token(id), Step::Broken]);
    let setup = Setup::limited((1..9).map(breaks).collect(), 2);
    let events = setup.events(request(9)).await;
    assert_eq!(tokens(&events, 0), [1, 2, 3]);
    assert!(matches!(failure(&events), EngineError::Unavailable { .. }));
    // An error that another worker would make too is the request's.
    let fails = Step::Fails(error(ErrorType::Backend(BackendError::Unknown)));
    let setup = Setup::new(vec![Taken::Begins(vec![token(1), fails])]);
    let events = setup.events(request(9)).await;
    assert_eq!(tokens(&events, 0), [1]);
    assert!(matches!(failure(&events), EngineError::Unavailable { .. }));
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_cancelled_while_no_worker_takes_it_on() {
    let first = Taken::Begins(vec![progress(5, 0), token(1), Step::Broken]);
    let setup = Setup::new(vec![first, Taken::Silent]);
    let (id, mut events) = setup.submit(request(9));
    let mut found = Vec::new();
    while tokens(&found, 0).is_empty() {
        found.push(events.recv().await.unwrap());
    }
    while setup.played.contexts.lock().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    setup.engine.cancel(id);
    found.extend(all(events).await);
    assert_eq!(end(&found, 0), Some((FinishReason::Cancelled, usage(0, 1))));
    assert!(setup.is_stopped(1));
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn scores_of_a_prompt_are_told_once() {
    let scored = |first: usize, positions: usize| {
        Step::Event(Event::Scored(Scored {
            first,
            logprobs: (first..first + positions)
                .map(|it| Some(-(it as f32)))
                .collect(),
            top: (first..first + positions)
                .map(|it| vec![(it as u32, 0.0)])
                .collect(),
            logits: (2 * first..2 * (first + positions))
                .map(|it| it as f32)
                .collect(),
        }))
    };
    let first = vec![scored(0, 2), scored(2, 1), Step::Broken];
    let second = vec![scored(0, 2), scored(2, 3), finished(FinishReason::Length)];
    let setup = Setup::new(vec![Taken::Begins(first), Taken::Begins(second)]);
    let events = setup.events(request(0)).await;
    let scores = events.iter().filter_map(|event| match event {
        Event::Scored(scored) => Some(scored.clone()),
        _ => None,
    });
    let scores: Vec<_> = scores.collect();
    let positions: Vec<_> = scores
        .iter()
        .flat_map(|it| it.first..it.first + it.logprobs.len())
        .collect();
    assert_eq!(positions, [0, 1, 2, 3, 4]);
    let last = scores.last().unwrap();
    assert_eq!(last.logprobs, [Some(-3.0), Some(-4.0)]);
    assert_eq!(last.top, [vec![(3, 0.0)], vec![(4, 0.0)]]);
    assert_eq!(last.logits, [6.0, 7.0, 8.0, 9.0]);
    assert_eq!(end(&events, 0), Some((FinishReason::Length, usage(0, 0))));
}

#[tokio::test(start_paused = true)]
async fn requests_that_come_together_are_taken_together() {
    let invalid = error(ErrorType::InvalidRequest);
    let waits = Taken::Begins(vec![progress(5, 0), Step::UntilStopped]);
    let setup = Setup::new(vec![waits, Taken::Refuses(invalid)]);
    let mut receivers = Vec::new();
    let requests = (0..2).map(|_| {
        let (sender, events) = unbounded_channel();
        receivers.push(events);
        let sink: Sink = Box::new(move |event| {
            sender.send(event).unwrap();
            ControlFlow::Continue(())
        });
        (request(9), sink)
    });
    let requests = requests.collect();
    let ids = setup.engine.submit_all(requests);
    assert_ne!(ids[0], ids[1]);
    for events in receivers {
        let events = all(events).await;
        assert_eq!(events.len(), 1, "{events:?}");
        assert!(matches!(failure(&events), EngineError::Refused { .. }));
    }
    assert!(setup.is_stopped(0));
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn workers_that_are_being_replaced_are_waited_for() {
    let gone = || Taken::Refuses(error(ErrorType::CannotConnect));
    let setup = Setup::new(vec![gone(), gone(), answer(&[1])]);
    let events = setup.events(request(9)).await;
    assert_eq!(tokens(&events, 0), [1]);
    // Not for ever.
    let setup = Setup::new((0..99).map(|_| gone()).collect());
    let events = setup.events(request(9)).await;
    assert_eq!(events.len(), 1);
    assert!(matches!(failure(&events), EngineError::Unavailable { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_says_nothing_is_an_error_that_names_the_setting() {
    let setup = Setup::new(vec![Taken::Silent]);
    let events = setup.events(request(9)).await;
    let error = failure(&events).to_string();
    assert!(
        error.contains("--dyn-host") && error.contains("120 s"),
        "{error}"
    );
    assert!(setup.idle());
}

#[tokio::test(start_paused = true)]
async fn without_workers_it_says_what_is_missing() {
    let totals = Arc::new(Totals::default());
    let route = Arc::new(OneWay(None));
    let engine = RoutedEngine::new(route, Limits::default(), totals, Handle::current());
    assert!(!engine.is_running());
    let error = engine.status().unwrap_err().to_string();
    assert_eq!(error, "no decode worker");
    let (sender, events) = unbounded_channel();
    let sink: Sink = Box::new(move |event| {
        sender.send(event).unwrap();
        ControlFlow::Continue(())
    });
    let since = tokio::time::Instant::now();
    engine.submit_all(vec![(request(9), sink)]);
    let events = all(events).await;
    assert_eq!(failure(&events).to_string(), "no decode worker");
    assert!(since.elapsed() < Duration::from_millis(1));
}

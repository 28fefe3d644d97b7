//! What the client of a request knows of its answers: what of a later replica's events is news, and what is left to compute.

use crate::engine::{Event, Request, Usage};

/// The events that the client of a request had.
pub(super) struct Told {
    /// The request as it was submitted.
    request: Request,
    answers: Vec<Answer>,
    /// Whether it knows that the request was queued.
    queued: bool,
    /// Prompt tokens that it knows were computed, and those that were scored.
    prefilled: usize,
    scored: usize,
}

/// One answer, as far as the client has it.
#[derive(Clone, Default)]
struct Answer {
    tokens: Vec<u32>,
    /// The first position whose trace it does not have.
    traced: usize,
    /// Prompt tokens that came from the cache of the first replica.
    cached: Option<usize>,
    ended: bool,
}

impl Told {
    pub(super) fn new(request: Request) -> Self {
        Self {
            answers: vec![Answer::default(); request.samples],
            request,
            queued: false,
            prefilled: 0,
            scored: 0,
        }
    }

    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    /// Whether an answer has ended.
    pub(super) fn has_ended(&self, sample: usize) -> bool {
        self.answers[sample].ended
    }

    /// The request for the rest of an answer; `None` if nothing is missing.
    pub(super) fn rest(&self, sample: usize) -> Option<Request> {
        let tokens = &self.answers[sample].tokens;
        let max_tokens = self.request.max_tokens.saturating_sub(tokens.len());
        if max_tokens == 0 && !tokens.is_empty() {
            return None;
        }
        Some(Request {
            prompt: [&self.request.prompt[..], tokens].concat(),
            max_tokens,
            samples: 1,
            first_sample: self.request.first_sample + sample,
            answered: self.request.answered + tokens.len(),
            ..self.request.clone()
        })
    }

    /// The token counts of an answer so far.
    pub(super) fn usage(&self, sample: usize) -> Usage {
        let answer = &self.answers[sample];
        Usage {
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: answer.cached.unwrap_or_default(),
            generated_tokens: answer.tokens.len(),
        }
    }

    /// The event for the client, in which answers have their numbers of the request as it was submitted; `None` if it is no
    /// news.
    pub(super) fn news(&mut self, event: Event) -> Option<Event> {
        match event {
            Event::Queued { .. } if std::mem::replace(&mut self.queued, true) => None,
            Event::Prefill { done, cached } => {
                for answer in &mut self.answers {
                    answer.cached.get_or_insert(cached);
                }
                let news = done > self.prefilled && done <= self.request.prompt.len();
                self.prefilled = self.prefilled.max(done);
                news.then_some(Event::Prefill { done, cached })
            }
            Event::Scored(scored) => {
                let end = scored.first + scored.logprobs.len();
                let news = scored.after(self.scored);
                self.scored = self.scored.max(end);
                news.map(Event::Scored)
            }
            Event::Trace { sample, frame } => {
                let answer = &mut self.answers[sample];
                let news = frame.position >= answer.traced;
                answer.traced = answer.traced.max(frame.position + 1);
                news.then_some(Event::Trace { sample, frame })
            }
            Event::Token {
                sample,
                id,
                logprobs,
            } => {
                self.answers[sample].tokens.push(id);
                Some(Event::Token {
                    sample,
                    id,
                    logprobs,
                })
            }
            Event::Finished {
                sample,
                reason,
                stop_token,
                ..
            } => {
                let usage = self.usage(sample);
                let ended = std::mem::replace(&mut self.answers[sample].ended, true);
                (!ended).then_some(Event::Finished {
                    sample,
                    reason,
                    stop_token,
                    usage,
                })
            }
            event => Some(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{FinishReason, Scored};

    fn token(sample: usize, id: u32) -> Event {
        Event::Token {
            sample,
            id,
            logprobs: None,
        }
    }

    fn told() -> Told {
        let mut told = Told::new(Request {
            samples: 2,
            first_sample: 3,
            answered: 1,
            ..Request::new(vec![1, 2, 3], 4)
        });
        for event in [token(1, 7), token(1, 8), token(0, 9)] {
            assert!(told.news(event).is_some());
        }
        told
    }

    #[test]
    fn the_rest_of_an_answer_is_a_request_of_its_own() {
        let mut told = told();
        let rest = told.rest(1).unwrap();
        assert_eq!(rest.prompt, [1, 2, 3, 7, 8]);
        let counts = (rest.max_tokens, rest.samples, rest.first_sample);
        assert_eq!((counts, rest.answered), ((2, 1, 4), 3));
        for id in 10..12 {
            told.news(token(1, id));
        }
        assert!(told.rest(1).is_none());
        // A prompt that is only computed is computed again.
        assert!(Told::new(Request::new(vec![1], 0)).rest(0).is_some());
    }

    #[test]
    fn nothing_is_told_twice() {
        let mut told = told();
        let mut is_news = |event| told.news(event).is_some();
        let queued = || Event::Queued { ahead: 0 };
        assert!(is_news(queued()) && !is_news(queued()));
        let prefill = |done| Event::Prefill { done, cached: 1 };
        assert!(is_news(prefill(2)) && !is_news(prefill(1)) && !is_news(prefill(2)));
        assert!(is_news(prefill(3)) && !is_news(prefill(4)));
        let scored = |first, count: usize| {
            Event::Scored(Scored {
                first,
                logprobs: vec![Some(0.5); count],
                top: vec![Vec::new(); count],
                logits: vec![0.0; 2 * count],
            })
        };
        assert!(is_news(scored(0, 2)) && !is_news(scored(0, 2)));
        let Some(Event::Scored(rest)) = told.news(scored(1, 2)) else {
            panic!("no scores");
        };
        assert_eq!(
            (rest.first, rest.logprobs.len(), rest.logits.len()),
            (2, 1, 2)
        );
    }

    #[test]
    fn an_answer_ends_once_with_the_counts_of_all_its_replicas() {
        let mut told = told();
        told.news(Event::Prefill { done: 3, cached: 2 });
        told.news(Event::Prefill { done: 5, cached: 4 });
        let end = || Event::Finished {
            sample: 1,
            reason: FinishReason::Stop,
            stop_token: None,
            usage: Usage::default(),
        };
        let Some(Event::Finished { usage, .. }) = told.news(end()) else {
            panic!("no end");
        };
        let counts = (
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.generated_tokens,
        );
        assert_eq!(counts, (3, 2, 2));
        assert!(told.has_ended(1) && !told.has_ended(0));
        assert!(told.news(end()).is_none());
    }
}

//! Lends this process' device to the other process of a pair, for as long as a connection lasts.

use std::sync::Arc;

use crate::backend::{Lent, Result, Ticket};
use crate::ranks::{Reply, Request, Steps, answer, answer_with};
use crate::transfer::peers::Peer;

/// Answers calls of the device, one after the other. What was lent is free when it returns.
pub(super) fn serve(
    lent: &Arc<Lent>,
    peer: &Peer,
    calls: impl Iterator<Item = (u32, Result<Request>)>,
) {
    let mut loan = lent.loan();
    let mut steps = Steps::new();
    for (number, request) in calls {
        if peer.ended().is_some() {
            // Nobody waits for what is left.
            break;
        }
        let reply = request.and_then(|request| match request {
            Request::Use {
                name,
                tensors,
                place,
                shape,
            } => Ok(Reply::Weight(loan.lend(&name, &tensors, place, shape)?)),
            request => answer_with(&mut loan, &mut steps, request).and_then(Ticket::wait),
        });
        answer(peer, number, reply);
    }
    // Steps use what the loan has.
    drop(steps);
}

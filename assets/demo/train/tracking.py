"""Tracking: people move, take things, drop them, hand them over; then where is who or what, and who has what."""
from words import *

MOVE = ["{p} goes to the {l}.", "{p} moves to the {l}.", "{p} walks to the {l}.", "{p} went to the {l}.", "{p} is in the {l}.", "{p} runs to the {l}.",
        "{p} enters the {l}."]
AGAIN = ["{p} goes to the {l}.", "{p} moves to the {l}.", "{p} walks to the {l}.", "{p} went to the {l}.", "{p} runs to the {l}.", "{p} goes back to the {l}.",
         "{p} enters the {l}.", "Then {p} goes to the {l}.", "Now {p} is in the {l}."]
TAKE = ["{p} takes the {t}.", "{p} picks up the {t}.", "{p} grabs the {t}.", "{p} gets the {t}.", "{p} took the {t}."]
DROP = ["{p} drops the {t}.", "{p} puts down the {t}.", "{p} leaves the {t}.", "{p} puts the {t} down.", "{p} dropped the {t}."]
GIVE = ["{p} gives the {t} to {r}.", "{p} hands the {t} to {r}.", "{p} gives {r} the {t}.", "{p} passes the {t} to {r}.", "{p} gave the {t} to {r}."]
WHERE_PERSON = ["Where is {p}?", "Where is {p}?", "Where is {p} now?", "Where's {p}?", "Which room is {p} in?",
                "Tell me where {p} is."]
WHERE_THING = ["Where is the {t}?", "Where is the {t}?", "Where is the {t} now?", "Where's the {t}?", "Tell me where the {t} is.",
               "Where can I find the {t}?"]
WHO = ["Who has the {t}?", "Who has the {t}?", "Who has the {t} now?", "Who holds the {t}?", "Who is holding the {t}?"]
WHAT = ["What does {p} have?", "What does {p} hold?", "What is {p} holding?", "What is {p} carrying?", "What does {p} carry?"]


class World:
    """People and things in places; one event a statement."""

    def __init__(self, rng, n, unknown=0.0):
        self.rng, self.statements, self.unknown = rng, n, unknown
        people = rng.randint(1, min(5, max(1, n // 2)))
        self.people = rng.sample(PEOPLE, people)
        self.places = rng.sample(PLACES, rng.randint(2, 6))
        self.things = rng.sample(THINGS, rng.randint(1, min(6, max(1, n // 2))))
        self.at, self.holder, self.lies = {}, {}, {}
        self.fixed = rng.random() < 0.3
        self.form = {}

    def wording(self, forms):
        """One wording throughout in some worlds, a new one for each event in others."""
        key = id(forms)
        if not self.fixed or key not in self.form:
            self.form[key] = self.rng.choice(forms)
        return self.form[key]

    def held(self, person):
        return [t for t, p in self.holder.items() if p == person]

    def say(self):
        rng = self.rng
        here = list(self.at)
        absent = [p for p in self.people if p not in self.at]
        choices = []
        if absent:
            choices += ["arrive"] * 3
        if here:
            choices += ["move"] * 2
            choices += ["take"] * 3 + ["drop"] * 2 + ["give"] * 2
        kind = rng.choice(choices)
        if kind == "arrive":
            person = absent[0]
            self.at[person] = rng.choice(self.places)
            return self.wording(MOVE).format(p=person, l=self.at[person])
        if kind == "move":
            person = rng.choice(here)
            self.at[person] = rng.choice([l for l in self.places if l != self.at[person]])
            return self.wording(AGAIN).format(p=person, l=self.at[person])
        if kind == "take":
            person = rng.choice(here)
            free = [t for t in self.things if t not in self.holder and self.lies.get(t, self.at[person]) == self.at[person]]
            if not free or len(self.held(person)) >= 3:
                return self.say()
            thing = rng.choice(free)
            self.lies.pop(thing, None)
            self.holder[thing] = person
            return self.wording(TAKE).format(p=person, t=thing)
        if not self.holder:
            return self.say()
        thing = rng.choice(list(self.holder))
        person = self.holder.pop(thing)
        if kind == "drop":
            self.lies[thing] = self.at[person]
            return self.wording(DROP).format(p=person, t=thing)
        others = [p for p in here if p != person and len(self.held(p)) < 3]
        if not others:
            self.holder[thing] = person
            return self.say()
        other = rng.choice(others)
        self.holder[thing] = other
        return self.wording(GIVE).format(p=person, t=thing, r=other)

    def ask(self):
        rng = self.rng
        seen = [*self.holder, *self.lies]
        unknown = rng.random() < self.unknown
        kind = rng.choices(["person", "thing", "who", "what"], [3, 5 * bool(seen), 3 * bool(seen), 2])[0]
        if kind in ("person", "what"):
            person = rng.choice([p for p in PEOPLE if p not in self.at] if unknown else list(self.at))
            form = rng.choice(WHERE_PERSON if kind == "person" else WHAT).format(p=person)
            if unknown:
                return form, f"I don't know where {person} is." if kind == "person" else f"I don't know what {person} has."
            if kind == "person":
                return form, f"{person} is in the {self.at[person]}."
            held = [f"the {t}" for t in self.held(person)]
            return form, f"{person} has {listing(held) if held else 'nothing'}."
        thing = rng.choice([t for t in THINGS if t not in seen] if unknown else seen)
        form = rng.choice(WHO if kind == "who" else WHERE_THING).format(t=thing)
        if unknown:
            return form, f"I don't know who has the {thing}." if kind == "who" else f"I don't know where the {thing} is."
        person = self.holder.get(thing)
        if kind == "who":
            return form, f"{person or 'Nobody'} has the {thing}."
        if person:
            return form, f"{person} has the {thing} in the {self.at[person]}."
        return form, f"The {thing} is in the {self.lies[thing]}."

"""Templates of story openings, by mood, and their filling."""

from __future__ import annotations

import random

GIRLS = ["Lily", "Sue", "Mia", "Anna", "Lucy", "Amy", "Emma", "Jane", "Daisy", "Bella", "Sara"]
BOYS = ["Tim", "Tom", "Ben", "Max", "Jack", "Bob", "Sam", "Joe", "Billy", "Timmy", "John"]
ANIMALS = [
    "dog",
    "cat",
    "bird",
    "bunny",
    "bear",
    "duck",
    "mouse",
    "frog",
    "fish",
    "lion",
    "monkey",
    "squirrel",
    "fox",
    "cow",
]
PLACES = ["park", "beach", "store", "zoo", "farm", "lake"]  # go to, play at
WOODS = ["forest", "garden", "park"]  # live in
TOYS = ["ball", "doll", "toy car", "kite", "book", "hat", "teddy bear", "bike", "balloon", "box"]
TRAITS = ["little", "small", "big", "brave", "kind", "funny", "clever"]
PRONOUNS = {
    "girl": {"he": "she", "his": "her", "him": "her"},
    "boy": {"he": "he", "his": "his", "him": "him"},
}

SAD = """
{name} was sad because {he} lost {his} {toy} at the {place}.
{name} was crying. {His} {toy} was broken and {he}
One day, {name} fell down at the {place} and hurt {his} knee.
It was raining and {name} could not go to the {place}. {He}
The {trait} {animal} was lost in the {woods} and felt very scared.
There was a {trait} {animal} who had no friends. The {animal}
{name} was angry because {his} friend took {his} {toy}.
{name} wanted a {toy}, but {his} mom said no. {name} felt
One night, {name} heard a loud noise and was scared. {He}
A {trait} {animal} was hungry and sad. It looked for food in the {woods}
{name} and {friend} had a fight at the {place}. They both felt
{name} was sick and had to stay in bed. {He} missed {his} {toy}
One day, a {trait} {animal} got stuck in a tree near the {place}.
{name}'s {toy} fell in the mud. {name} started to cry
{friend} was mean to {name} at the {place}. {name}
{name} could not find {his} mom at the {place}. {He} was scared
The {animal} was mad at the {animal2}. They did not want to share the {toy}
{name} broke {his} mom's {thing} and felt bad. {He}
A big storm came to the {woods}. The {trait} {animal} was afraid
Nobody wanted to play with {name} and {his} {toy}. {He} sat alone
"""
NEUTRAL = """
{name} and {his} mom went to the {place} to find a {toy}.
One day, {name} saw a {trait} {animal} near the {place}.
In the {woods}, there lived a {trait} {animal} who
One morning, {name} woke up and looked for {his} {toy}.
{name} had a {toy}. {He} took it to the {place} and
A {trait} {animal} walked to the {place}. On the way, it met a {animal2}
{name} asked {his} dad, "Can we go to the {place} with my {toy}?"
{name} found a {toy} under {his} bed. {He} wanted to
{name} and {friend} sat in the {woods}. They saw a {animal} and
The {trait} {animal} wanted to see the {place}, so it
Once there was a {trait} {animal} who lived near the {place}. Every day, the {animal}
"What is that?" asked {name}. {friend} pointed at the {animal}
Mom gave {name} a {toy} and said, "Take it to the {place}
A {animal} and a {animal2} lived in a {woods}. One day, they
{name} opened the door and saw a {trait} {animal}. It
{name} had a {trait} {animal}. One day, the {animal} ran to the {place}
There was a {thing} on the table. {name} looked at it and
{friend} and {name} walked in the {woods} and found a {toy}.
One day, {name} went to the {place} to see a {animal}. The {animal}
A {animal} sat on a {toy} in the {woods}. Then a {trait} {animal2}
"""
HAPPY = """
{name} was very happy because it was {his} birthday. {His} dad gave {him} a {toy}
It was a sunny day and {name} ran to the {place} with {his} {toy}.
{name} loved {his} new {toy}. {He} showed it to {friend}
{name} and {friend} were best friends. They loved to play in the {woods}
A happy {animal} lived in the {woods}. It liked to sing and
{name} smiled when {he} saw the {trait} {animal} at the {place}.
The {trait} {animal} was so excited to go to the {place}. It
{name} hugged {his} mom and said, "Thank you for the {toy}!
{name} laughed and jumped in the {woods}. {He} was having fun with
One day, {name} found a shiny {toy} at the {place}. {He} was so happy
{friend} gave {name} a pretty {toy}. {name} said, "Thank you
The {animal} and the {animal2} danced in the {woods}. They were happy
{name} was proud of {his} {toy}. {He} wanted to share it with {friend}
The sun was bright and {name} had a yummy picnic at the {place} with a {animal}
{name} loved to help {his} friends. One day, a {trait} {animal}
{name} and {his} dad had fun at the {place}. They saw a beautiful {animal}
{name} won a {toy} at the {place}. {He} was very excited and
The {trait} {animal} found a yummy {food} in the {woods}. It smiled and
{name}'s mom made a yummy {food}. {name} was happy and
{name} made a new friend at the {place}. His name was {boy}
"""
MOODS = ("sad", "neutral", "happy")
TEMPLATES = {mood: block.strip().splitlines() for mood, block in zip(MOODS, (SAD, NEUTRAL, HAPPY), strict=True)}


def fill(template: str, rng: random.Random) -> str:
    """`template` with its blanks filled from the lists above; pronouns agree with the name."""
    kind = rng.choice(["girl", "boy"])
    name = rng.choice(GIRLS if kind == "girl" else BOYS)
    animal, animal2 = rng.sample(ANIMALS, 2)
    pronouns = PRONOUNS[kind]
    return template.format(
        name=name,
        friend=rng.choice([other for other in GIRLS + BOYS if other != name]),
        boy=rng.choice([other for other in BOYS if other != name]),
        **pronouns,
        He=pronouns["he"].capitalize(),
        His=pronouns["his"].capitalize(),
        animal=animal,
        animal2=animal2,
        trait=rng.choice(TRAITS),
        place=rng.choice(PLACES),
        woods=rng.choice(WOODS),
        toy=rng.choice(TOYS),
        thing=rng.choice(["cup", "lamp", "plate", "book"]),
        food=rng.choice(["cake", "cookie", "apple", "pie"]),
    )


def random_opening(rng: random.Random) -> str:
    """A template of any mood, filled."""
    return fill(rng.choice(TEMPLATES[rng.choice(MOODS)]), rng)

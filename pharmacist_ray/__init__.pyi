from pharmacist_ray.api import Curated as Curated
from pharmacist_ray.api import align as align
from pharmacist_ray.api import attack as attack
from pharmacist_ray.api import configure as configure
from pharmacist_ray.api import curate as curate
from pharmacist_ray.api import evaluate as evaluate
from pharmacist_ray.api import score as score
from pharmacist_ray.api import search_settings as search_settings
from pharmacist_ray.errors import PharmacistError as PharmacistError

__version__: str

from dinoengine.engine import hooks
from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.classifier_trainer import ClassifierTrainer, trainer_class_of
from dinoengine.engine.command import run_command, train_or_evaluate
from dinoengine.engine.config_loading import load_config
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.evaluation_weights import load_weights_for_evaluation
from dinoengine.engine.launch import launch
from dinoengine.engine.parallel import create_ddp_model, unwrap_model
from dinoengine.engine.predictor import DefaultPredictor
from dinoengine.engine.reporting import ReportingTrainer
from dinoengine.engine.run_writers import default_writers
from dinoengine.engine.setup import default_setup, save_config
from dinoengine.engine.simple_trainer import AMPTrainer, SimpleTrainer
from dinoengine.engine.ssl_trainer import SSLTrainer
from dinoengine.engine.train_loop import HookBase, TrainerBase
from dinoengine.engine.user_errors import exit_on_user_error

__all__ = [
    "AMPTrainer",
    "ClassifierTrainer",
    "DefaultPredictor",
    "DefaultTrainer",
    "HookBase",
    "ReportingTrainer",
    "SSLTrainer",
    "SimpleTrainer",
    "TrainerBase",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "exit_on_user_error",
    "hooks",
    "launch",
    "load_config",
    "load_weights_for_evaluation",
    "run_command",
    "save_config",
    "train_or_evaluate",
    "trainer_class_of",
    "unwrap_model",
]

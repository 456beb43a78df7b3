_SHARED = 25

JOB_NAME = "base"
DO_ALERT = False
cudnn_deterministic = False
cudnn_benchmark = False

monitor = {
    "alert": dict(
        enable_feishu_alert=DO_ALERT,
        feishu_alert_address=None,
        light_monitor_address=None,
        alert_file_path=f"llm_alter/{JOB_NAME}_alert.log",
    ),
    "tensorboard": dict(queue_max_length=10),
}
